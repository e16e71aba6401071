"""Every output, command, example and recipe of the README is run and compared."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import helpers
import pytest
import tiny
import torch
import yaml
from commands import Server

from apportion.cli.inspection import credit as credit_command
from apportion.cli.main import COMMANDS, main

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
ABOVE = (
    "transformers",
    "peft",
    "datasets",
    *(f"apportion.{m}" for m in ("models", "data", "stages", "generation", "evidence", "training")),
)
STEPS = ["--steps", "2", "--sampling.batch_size", "8", "--sampling.max_new_tokens", "8", "--log_rollouts", "8"]


def blocks(language: str) -> list[str]:
    """Return the README's fenced blocks of `language` ("" for none)."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)
    return [text for name, text in found if name == language]


def python(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run a new Python process."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)


def train(heavy: Server, folder: Path, path: Path, *flags: str) -> list[dict[str, Any]]:
    """Run `apportion rl` on tiny models in `folder`, with `path` on PYTHONPATH; return the logged rollouts."""
    tiny.save_policy(folder / "policy")
    tiny.save_reward(folder / "reward")
    tiny.save_prompts(folder / "prompts.jsonl")
    models = ["--policy", "policy", "--reward_model", "reward", "--prompts", "prompts.jsonl", "--output", "run"]
    heavy.run("rl", *models, *STEPS, *flags, cwd=folder, PYTHONPATH=str(path)).assert_done()
    return [json.loads(line) for line in (folder / "run" / "rollouts.jsonl").read_text().split("\n") if line]


def test_the_python_example_prints_the_readmes_output(tmp_path: Path) -> None:
    example, *_ = blocks("python")
    (tmp_path / "example.py").write_text(example, encoding="utf-8")
    done = python("example.py", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout and done.stdout in blocks("")


def test_my_credit_spreads_by_the_power_of_attention(heavy: Server, tmp_path: Path) -> None:
    _, module = blocks("python")
    code = tmp_path / "code"
    code.mkdir()
    (code / "my_credit.py").write_text(module, encoding="utf-8")
    rows = train(heavy, tmp_path, code, "--credit", "my_credit:sharp", "--credit.power", "3")
    assert len(rows) == 16
    for row in rows:
        shares = torch.tensor(row["alpha"]).double() ** 3
        expected = 0.8 * row["score"] * shares / shares.sum()
        expected[-1] += 0.2 * row["score"]
        torch.testing.assert_close(torch.tensor(row["credit"]).double(), expected, rtol=1e-3, atol=1e-4)
    assert "credit/max_share" in (tmp_path / "run" / "metrics.jsonl").read_text()


def test_the_loop_learns_and_loads_no_model_library(tmp_path: Path) -> None:
    file = ROOT / "examples" / "own_loop.py"
    assert file.read_text(encoding="utf-8").count("\n") < 60
    code = f"""
import runpy, sys
sys.argv[1:] = ["attention"]
runpy.run_path({str(file)!r}, run_name="__main__")
print([name for name in sys.modules if name.startswith({ABOVE})])
"""
    done = python("-c", code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    *reported, loaded = done.stdout.splitlines()
    scores = [float(re.search(r"score ([\d.]+)", line)[1]) for line in reported]
    assert scores[0] < 5 and scores[-1] > 12, reported
    assert loaded == "[]"


def own_credit() -> ModuleType:
    """Return examples/own_credit.py as a module."""
    spec = importlib.util.spec_from_file_location("own_credit", ROOT / "examples" / "own_credit.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_own_credit_gives_punctuation_nothing(heavy: Server, tmp_path: Path) -> None:
    rows = train(heavy, tmp_path, ROOT / "examples", "--credit", "own_credit:words", "--credit.mix", "1.0")
    for row in rows:
        letters = [any(c.isalpha() for c in token) for token in row["tokens"]]
        count = sum(letters)
        expected = [row["score"] * (has / count if count else 1 / len(letters)) for has in letters]
        assert row["credit"] == pytest.approx(expected, abs=1e-5)
    assert {has for row in rows for has in (any(c.isalpha() for c in t) for t in row["tokens"])} == {True, False}


def test_own_credit_charges_for_repeated_pairs() -> None:
    mask = helpers.bools([[1, 1, 1, 1, 1, 1], [1, 1, 0, 1, 1, 0], [1, 1, 1, 1, 0, 0]])
    ids = torch.tensor([[5, 6, 5, 6, 5, 6], [5, 6, 9, 5, 6, 0], [5, 5, 5, 5, 5, 5]])
    rollouts = helpers.rollouts(mask, response_ids=ids)
    method = own_credit().repetition(cost=0.5)
    rewards = torch.where(mask, 1.0, torch.nan)
    paid, _ = method.assign(rollouts, rewards, method.init())
    expected = [[1, 1, 1, 0.5, 0.5, 0.5], [1, 1, 0, 1, 0.5, 0], [1, 1, 0.5, 0.5, 0, 0]]
    assert paid.tolist() == expected
    total, count = method.stats(rollouts, rewards, paid)["credit/repetition/rate"]
    assert (float(total), float(count)) == (6, 14)


def test_own_credit_stands_in_a_chain(heavy: Server, tmp_path: Path) -> None:
    chain = "[attention, {own_credit:repetition: {cost: 0.2}}, kl_penalty]"
    rows = train(heavy, tmp_path, ROOT / "examples", "--credit", chain)
    assert len(rows) == 16 and "credit/repetition/rate" in (tmp_path / "run" / "metrics.jsonl").read_text()
    page = (ROOT / "docs" / "run-folder.md").read_text(encoding="utf-8")
    metrics = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    short = ("credit/", "monitors/")  # whose names stand together in a row of the page
    for key in [*rows[0], *metrics]:
        names = [key, key.rpartition("/")[2]] if key.startswith(short) else [key]
        assert names[-1] == "rate" or any(f"`{name}`" in page for name in names), f"run-folder.md lacks {key}"


SETTINGS = [path for path in sorted(ROOT.glob("recipes/**/*.yaml")) if "accelerate" not in path.parts]


@pytest.mark.parametrize(
    "recipe", [path for path in SETTINGS if "\nstages:" not in path.read_text()], ids=lambda path: path.stem
)
def test_a_recipe_is_valid_and_all_of_it_is_used(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["rl", "--config", str(recipe), "--dry-run"]) == 0
    resolved = yaml.safe_load(capsys.readouterr().out)
    for key, value in yaml.safe_load(recipe.read_text(encoding="utf-8")).items():
        if isinstance(value, dict) and key not in ("credit", "segments", "advantages"):
            assert resolved[key] | value == resolved[key], key
        else:
            assert resolved[key] == value, key


def test_the_imdb_recipes_differ_in_credit_alone() -> None:
    settings = [
        yaml.safe_load(path.read_text(encoding="utf-8")) for path in sorted(ROOT.glob("recipes/rl/imdb_*.yaml"))
    ]
    assert len(settings) == 3
    for other in settings[1:]:
        assert {k for k in settings[0] if settings[0][k] != other.get(k)} == {"algorithm", "credit", "output"}


def command_lines() -> list[list[str]]:
    """Return the words of every `apportion ...` line in fenced blocks and in code spans of the README."""
    spans = re.findall(r"(?<!`)`((?:PYTHONPATH=\S+ )?apportion [a-z][^`]*)`(?!`)", README)
    lines = [line for block in blocks("") for line in block.splitlines() if "apportion " in line]
    found = [shlex.split(line, comments=True) for line in [*lines, *spans]]
    return [words[words.index("apportion") + 1 :] for words in found if "apportion" in words]


def test_every_command_in_the_readme_is_understood(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "my_credit.py").write_text(blocks("python")[1], encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    lines = command_lines()
    assert {words[0] for words in lines} == set(COMMANDS)
    for name, *flags in lines:
        if name in ("rl", "reward", "evaluate", "demo") and (flags or name != "rl"):
            assert main([name, *flags, "--dry-run"]) == 0, (name, flags, capsys.readouterr().err)
        elif name == "credit" and flags:
            options = dict(zip(flags[::2], flags[1::2], strict=True))
            credit_command._check({key.removeprefix("--"): value for key, value in options.items()})
            assert all(key in credit_command.HELP for key in options)


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)\)", page.read_text(encoding="utf-8"))
    here = [link for link in links if not link.startswith("https://") and "docs/images/" not in link]
    assert [link for link in here if not (page.parent / link).exists()] == []
