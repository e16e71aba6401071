"""Recipes that cannot run: one message with file, line, stage and setting, before anything is loaded or written."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_recipes
from commands import Server

from apportion.config.chain.recipe import read_recipe
from apportion.config.chain.resolve import resolve
from apportion.errors import ConfigError
from apportion.stages.recipe.inputs import inputs_of

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
    "no such stage": (
        "stages:\n  sft:\n  dpo:\n    model: ${fst.model}\n",
        ["line 4: stages.dpo.model: got 'fst'", "'sft'"],
    ),
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
    "a tab": ("stages:\n  sft:\n\tsteps: 1\n", ["a recipe in YAML", "'\\t' that cannot start any token", "line 3"]),
    "an alias in itself": ("stages: &a\n  sft: *a\n", ["a recipe in YAML", "alias inside its own anchor"]),
    "an alias of nothing": ("stages:\n  sft: *a\n", ["a recipe in YAML", "undefined alias 'a'"]),
    "a Python object": ("stages:\n  sft: {data: !!python/name:os.system x}\n", ["a recipe in YAML", "python/name"]),
    "two documents": ("stages:\n  sft:\n---\nstages:\n  sft:\n", ["a recipe in YAML", "expected a single document"]),
    "setting twice": (
        "stages:\n  sft:\n    optim.lr: 1e-3\n    optim: {lr: 1e-4}\n",
        ["line 3: stages.sft.optim.lr: got 0.001", "`optim` has it too"],
    ),
    "a section that is a number": ("stages:\n  sft:\n    optim: 3\n", ["line 3: stages.sft.optim: got 3"]),
    "a text for a number": ("stages:\n  sft:\n    steps: '3'\n", ["line 3: stages.sft.steps: got '3'", ">= 1"]),
    "a list for a name": ("stages:\n  sft:\n    data: [a, b]\n", ["line 3: stages.sft.data: got ['a', 'b']"]),
    "a kind that is a list": ("stages:\n  a: {stage: [sft]}\n", ["line 2: stages.a.stage"]),
    "variables in a list": ("vars: [a]\nstages:\n  sft:\n", ["line 1: vars: got ['a']", "a mapping"]),
    "output that is a number": ("output: 3\nstages:\n  sft:\n", ["line 1: output: got 3"]),
    "two that need each other": (
        "stages:\n  sft:\n    model: ${dpo.model}\n  dpo:\n    model: ${sft.model}\n",
        ["line 3: stages.sft.model: got '${dpo.model}'", "before this one"],
    ),
    "key twice": ("stages:\n  sft:\n  sft:\n", ["a recipe in YAML", "repeated in line 3"]),
    "a name that is too long": (f"stages:\n  {'x' * 300}: {{stage: sft}}\n", ["at most 100 characters"]),
    "an output of no stage": (
        "stages:\n  sft:\n    model: ${a.b}\n",
        ["line 3: stages.sft.model: got '${a.b}'"],
    ),
    "a variable in a variable": (
        "vars: {a: x, b: '${a}'}\nstages:\n  sft:\n    model: ${b}\n",
        ["line 1: vars.b: got '${a}'", "a value without a reference"],
    ),
    "the best of a stage that keeps none": (
        "stages:\n  rl:\n  dpo:\n    model: ${rl.best}\n",
        ["line 4: stages.dpo.model: got '${rl.best}'", "Set rl.keep_best.every", "use ${rl.model}"],
    ),
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
        (["recipe.yaml", "--from", ""], ["--from: got ''"]),
        (["recipe.yaml", "--only", ","], ["--only: got ','"]),
        (["recipe.yaml", "--redo="], ["--redo: got ''"]),
        (["recipe.yaml", "--output", ""], ["--output: got ''"]),
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


JUDGED = """
stages:
  reward: {data: rows.jsonl, model: base}
  evaluate:
    policies: [base]
    prompts: rows.jsonl
    judges: [judges:vowels, {"${reward.model}": {name: held_out}}, imdb, json]
"""


def test_judges_are_what_evaluate_takes(light: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Functions, rules and models with settings; a model of an earlier stage is one of the stage's inputs."""
    (tmp_path / "recipe.yaml").write_text(JUDGED)
    tiny_recipes.rankings(tmp_path / "rows.jsonl", 2)
    (tmp_path / "base").mkdir()
    monkeypatch.chdir(tmp_path)
    reward, evaluate = resolve(read_recipe("recipe.yaml"))
    folder = str(reward.folder / "final")
    assert evaluate.config.judges[1] == {folder: {"name": "held_out"}} and evaluate.uses == ("reward",)
    found = inputs_of(evaluate, [reward])
    assert [(one.name, one.source) for one in found if one.setting == "judges"] == [(folder, "stage")]
    assert not [one for one in found if one.setting == "against"]
    light.run("run", "recipe.yaml", "--dry_run", cwd=tmp_path).assert_done()
    (tmp_path / "recipe.yaml").write_text(JUDGED.replace("name: held_out", "nmae: held_out"))
    refused = light.run("run", "recipe.yaml", cwd=tmp_path)
    refused.assert_refused("line 7: stages.evaluate.judges", "got 'nmae'")


def test_anchors_merge_keys_and_their_overrides_are_read(tmp_path: Path) -> None:
    text = "stages:\n  sft: &small {data: x.jsonl, steps: 3, optim: {lr: 1e-3}}\n"
    text += "  second:\n    <<: *small\n    stage: sft\n    model: ${sft.model}\n    steps: 4\n"
    (tmp_path / "recipe.yaml").write_text(text)
    first, second = resolve(read_recipe(str(tmp_path / "recipe.yaml")))
    assert (first.config.steps, second.config.steps) == (3, 4)
    assert second.config.optim.lr == 1e-3 and second.config.model == str(first.folder / "final")


SINGLE = "output: runs\nstages:\n  sft: {data: rows.jsonl, model: base}\n"


def write_single(folder: Path) -> None:
    """Write a recipe of one stage and what it reads."""
    (folder / "recipe.yaml").write_text(SINGLE)
    tiny_recipes.rankings(folder / "rows.jsonl", 2)
    (folder / "base").mkdir()
    (folder / "runs" / "sft").mkdir(parents=True)


def test_a_folder_of_another_recipe_is_refused(light: Server, tmp_path: Path) -> None:
    write_single(tmp_path)
    content = '{"stage": "run", "recipe": "elsewhere/other.yaml", "status": "failed", "stages": {}}'
    (tmp_path / "runs" / "status.json").write_text(content)
    refused = light.run("run", "recipe.yaml", cwd=tmp_path)
    refused.assert_refused("output: got 'runs of other.yaml'", "one of recipe.yaml", "another --output")
    assert (tmp_path / "runs" / "status.json").read_text() == content


def test_a_stage_folder_of_another_run_is_refused(light: Server, tmp_path: Path) -> None:
    write_single(tmp_path)
    (tmp_path / "runs" / "sft" / "metrics.jsonl").write_text('{"step": 1}\n')
    refused = light.run("run", "recipe.yaml", cwd=tmp_path)
    refused.assert_refused("stage sft: got 'runs/sft of another run'", "another --output")
    assert [one.name for one in (tmp_path / "runs" / "sft").iterdir()] == ["metrics.jsonl"]


def test_a_folder_of_another_command_is_refused(light: Server, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("output: runs\nstages:\n  sft: {data: rows.jsonl, model: base}\n")
    tiny_recipes.rankings(tmp_path / "rows.jsonl", 2)
    (tmp_path / "base").mkdir()
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "status.json").write_text('{"stage": "rl", "status": "failed"}')
    refused = light.run("run", "recipe.yaml", cwd=tmp_path)
    refused.assert_refused("output: got 'runs of `apportion rl`'")
