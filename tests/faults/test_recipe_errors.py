"""Recipes that cannot run: one message with file, line, stage and setting, before anything is loaded or written."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_recipes
from commands import Server

from apportion.config.chain.recipe import read_recipe
from apportion.config.chain.resolve import resolve
from apportion.errors import ConfigError

BAD = {
    "no mapping": ("- sft\n", ["a mapping with the key `stages`"]),
    "no stages": ("description: x\n", ["a mapping with the key `stages`"]),
    "empty stages": ("stages: {}\n", ["line 1: stages", "at least one stage"]),
    "unknown key": ("stage: 1\nstages:\n  sft:\n", ["line 1: stage", "'stages'"]),
    "unknown stage": ("stages:\n  mine: {data: x}\n", ["line 2: stages.mine", "`stage: rl`"]),
    "misspelt stage": ("stages:\n  a: {stage: rewrad}\n", ["line 2: stages.a.stage", "'reward'"]),
    "unknown setting": ("stages:\n  sft:\n    lr: 1\n", ["line 3: stages.sft.lr", "optim.lr"]),
    "unknown inner setting": ("stages:\n  sft:\n    optim.rate: 1\n", ["stages.sft.optim.rate", "optim.lr"]),
    "refused value": ("stages:\n  sft:\n    steps: 0\n", ["line 3: stages.sft.steps: got 0", ">= 1"]),
    "refused inner value": ("stages:\n  sft:\n    optim:\n      lr: -1\n", ["line 4: stages.sft.optim.lr: got -1"]),
    "own output": ("stages:\n  sft:\n    output: here\n", ["line 3: stages.sft.output", "OUTPUT/STAGE"]),
    "settings in a list": ("stages:\n  sft: [1]\n", ["line 2: stages.sft", "a mapping"]),
    "bad name": ("stages:\n  'a b': {stage: sft}\n", ["line 2: stages.a b", "begins with a letter"]),
    "later stage": (
        "stages:\n  sft:\n    data: ${split.demonstrations}\n  split: {data: x.jsonl}\n",
        ["line 3: stages.sft.data", "before this one"],
    ),
    "itself": ("stages:\n  sft:\n    model: ${sft.model}\n", ["line 3: stages.sft.model", "before this one"]),
    "no such stage": ("stages:\n  sft:\n    model: ${fst.model}\n", ["line 3: stages.sft.model: got 'fst'"]),
    "no such output": (
        "stages:\n  sft:\n  dpo:\n    model: ${sft.modle}\n",
        ["line 4: stages.dpo.model", "'sft.modle'", "Did you mean 'sft.model'"],
    ),
    "stage without output": ("stages:\n  sft:\n  dpo:\n    model: ${sft}\n", ["line 4", "Write ${sft.model}"]),
    "no such variable": ("vars: {a: 1}\nstages:\n  sft:\n    data: ${b}\n", ["line 4: stages.sft.data", "(a)"]),
    "no reference": ("stages:\n  sft:\n    data: ${}\n", ["line 3: stages.sft.data", "a reference"]),
    "variable without value": (
        "vars:\n  rows: null\nstages:\n  sft:\n    data: ${rows}\n",
        ["line 2: vars.rows: got None", "stages.sft.data needs it", "--set rows=VALUE"],
    ),
    "unquoted reference": ("stages:\n  split: {data: [${a}]}\n", ["a recipe in YAML", 'quoted: "${sft.model}"']),
    "key twice": ("stages:\n  sft:\n  sft:\n", ["a recipe in YAML", "repeated in line 3"]),
    "expectation": ("expect: {minutes: soon}\nstages:\n  sft:\n", ["line 1: expect.minutes: got 'soon'"]),
}


@pytest.mark.parametrize("name", BAD)
def test_a_recipe_that_cannot_be_read_is_named_with_its_line(name: str, tmp_path: Path) -> None:
    text, pieces = BAD[name]
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        resolve(read_recipe(str(path)))
    message = str(caught.value)
    assert all(piece in message for piece in [str(path), *pieces]), message


MISSING = """
vars: {rows: rows.jsonl}
stages:
  first: {stage: sft, data: "${rows}", model: base}
  second: {stage: dpo, data: pairs.jsonl, model: "${first.model}"}
"""


def test_a_stage_that_misses_its_input_is_refused_before_anything_is_loaded(light: Server, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(MISSING)
    tiny_recipes.rankings(tmp_path / "rows.jsonl", 2)
    (tmp_path / "base").mkdir()
    refused = light.run("run", "recipe.yaml", cwd=tmp_path)
    refused.assert_refused(
        "stage second: data: got 'pairs.jsonl'", "an output of an earlier stage", "--set second.data="
    )
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("words", "pieces"),
    [
        ([], ["RECIPE: got 'nothing'"]),
        (["absent.yaml"], ["RECIPE: got 'absent.yaml (No such file"]),
        (["recipe.yaml", "second.yaml"], ["argument: got 'second.yaml'"]),
        (["recipe.yaml", "--fresh"], ["flag: got '--fresh'"]),
        (["recipe.yaml", "--set"], ["--set: got 'nothing'"]),
        (["recipe.yaml", "--set", "steps"], ["--set: got 'steps'", "NAME=VALUE"]),
        (["recipe.yaml", "--set", "rwos=1"], ["--set: got 'rwos'", "'rows'"]),
        (["recipe.yaml", "--set", "third.steps=1"], ["--set: got 'third'", "first, second"]),
        (["recipe.yaml", "--set", "first.stpes=1"], ["got 'stpes'", "'steps'"]),
        (["recipe.yaml", "--set", "first.output=x"], ["got 'output'"]),
        (["recipe.yaml", "--set", "first.steps=none"], ["stages.first.steps: got 'none'"]),
        (["recipe.yaml", "--only", "frist"], ["--only: got 'frist'", "'first'"]),
        (["recipe.yaml", "--redo", "x"], ["--redo: got 'x'"]),
        (["recipe.yaml", "--from", "x"], ["--from: got 'x'"]),
    ],
)
def test_a_wrong_word_of_the_command_is_refused(
    words: list[str], pieces: list[str], light: Server, tmp_path: Path
) -> None:
    (tmp_path / "recipe.yaml").write_text(MISSING)
    refused = light.run("run", *words, cwd=tmp_path)
    refused.assert_refused_early(*pieces)
    assert not (tmp_path / "runs").exists()


def test_a_reward_or_a_method_that_does_not_exist_is_refused_with_its_place(light: Server, tmp_path: Path) -> None:
    text = "stages:\n  ppo:\n    stage: rl\n    credit: atention\n    reward_model: base\n"
    (tmp_path / "recipe.yaml").write_text(text)
    (tmp_path / "base").mkdir()
    refused = light.run("run", "recipe.yaml", cwd=tmp_path)
    refused.assert_refused("line 4: stages.ppo.credit: got 'atention'", "'attention'")


def test_a_folder_of_another_command_is_refused(light: Server, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("output: runs\nstages:\n  sft: {data: rows.jsonl, model: base}\n")
    tiny_recipes.rankings(tmp_path / "rows.jsonl", 2)
    (tmp_path / "base").mkdir()
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "status.json").write_text('{"stage": "rl", "status": "failed"}')
    refused = light.run("run", "recipe.yaml", cwd=tmp_path)
    refused.assert_refused("output: got 'runs of `apportion rl`'")
