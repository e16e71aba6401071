"""`apportion run`: stages in order on tiny models, finished ones skipped, changed ones refused, killed ones resumed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import tiny_recipes
import tiny_runs
from commands import ENVIRONMENT, Result, Server, run_python

from apportion.config.chain.kinds import KINDS
from apportion.config.chain.recipe import read_recipe
from apportion.config.chain.resolve import resolve

ROOT = Path(__file__).parents[2]
RECIPES = sorted(path for path in (ROOT / "recipes").glob("*.yaml") if "\nstages:" in path.read_text())
GIVEN = {  # variables that have to be given
    "oasst-ppo": ("rankings",),
    "gsm8k-grpo": ("prompts", "held_out"),
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_recipes.world(tmp_path_factory.mktemp("world"))


def apportion(folder: Path, *words: object) -> Result:
    """Run `apportion run` on the recipe of `folder` in a process of its own, as people do."""
    set_ = ["--set", f"rankings={folder / 'rankings.jsonl'}"]
    return run_python("-m", "apportion", "run", folder / "recipe.yaml", *set_, *words, cwd=folder, timeout=300)


def state(folder: Path) -> dict[str, Any]:
    """Return the stages in status.json of the chain."""
    found: dict[str, Any] = json.loads((folder / "chain" / "status.json").read_text())["stages"]
    return found


@pytest.fixture(scope="module")
def done(world: Path) -> Result:
    """The chain, run to its end."""
    return apportion(world)


def test_every_stage_runs_and_gives_what_the_next_one_reads(world: Path, done: Result) -> None:
    done.assert_done()
    assert "1/5 split: apportion split" in done.err and "5/5 dpo: apportion dpo" in done.err
    assert f"ppo: {world / 'chain' / 'ppo' / 'final'}" in done.out
    assert {name: one["status"] for name, one in state(world).items()} == dict.fromkeys(state(world), "finished")
    ppo = json.loads((world / "chain" / "status.json").read_text())
    assert ppo["status"] == "finished" and ppo["stages"]["ppo"]["settings"]["steps"] == 2
    assert len(tiny_runs.read_lines(world / "chain" / "ppo" / "metrics.jsonl")) == 2
    held, trained = (
        {row["prompt"] for row in tiny_runs.read_lines(world / "chain" / "split" / f"{name}.jsonl")}
        for name in ("held_out_prompts", "rankings")
    )
    assert len(held) == 6 and len(trained) == 34 and not held & trained


def test_a_second_call_skips_what_is_finished(world: Path, done: Result) -> None:
    before = {path: path.stat().st_mtime_ns for path in (world / "chain").rglob("final/*")}
    again = apportion(world)
    again.assert_done()
    assert again.err.count("finished before") == 5 and ": apportion split, in" not in again.err
    assert {path: path.stat().st_mtime_ns for path in (world / "chain").rglob("final/*")} == before


def test_a_changed_setting_is_an_error_that_names_stage_setting_and_fix(world: Path, done: Result) -> None:
    changed = apportion(world, "--set", "dpo.beta=0.2")
    assert changed.code == 2 and "stage dpo: got 'beta was 0.1 and is 0.2'" in changed.err
    assert "--redo dpo" in changed.err and state(world)["dpo"]["settings"]["beta"] == 0.1


def test_a_stage_that_is_redone_takes_those_that_use_it_along(world: Path, done: Result) -> None:
    first = {name: one["finished"] for name, one in state(world).items()}
    redone = apportion(world, "--redo", "reward", "--set", "reward.seed=3")
    redone.assert_done()
    new = {name for name, one in state(world).items() if one["finished"] != first[name]}
    assert new == {"reward", "ppo"}
    assert state(world)["reward"]["settings"]["seed"] == 3


def test_a_stage_that_could_not_start_over_does_so_later(tmp_path: Path) -> None:
    """A kill, or a check that fails, before the stage has removed its old run: that one is not the new one."""
    folder = tiny_recipes.world(tmp_path)
    assert apportion(folder, "--only", "split").code == 0
    status = folder / "chain" / "status.json"
    known = json.loads(status.read_text())
    before = (folder / "chain" / "split" / "config.yaml").stat().st_mtime_ns
    known["stages"]["split"] |= {"status": "running", "begun": time.time() + 1}  # as --redo writes it, then a SIGKILL
    status.write_text(json.dumps(known))
    assert apportion(folder, "--only", "split").code == 0
    assert (folder / "chain" / "split" / "config.yaml").stat().st_mtime_ns > before


def test_a_changed_file_is_noticed(world: Path, done: Result, tmp_path: Path) -> None:
    copy = tiny_recipes.world(tmp_path)
    assert apportion(copy, "--only", "split").code == 0
    with (copy / "rankings.jsonl").open("a") as file:
        file.write(json.dumps({"prompt": "Film 99 was", "completions": [" a", " b"], "ranks": [1, 2]}) + "\n")
    changed = apportion(copy, "--only", "split")
    assert changed.code == 2 and f"{copy / 'rankings.jsonl'} has changed" in changed.err
    assert "--redo split" in changed.err


def test_only_needs_what_the_stages_before_make(tmp_path: Path) -> None:
    folder = tiny_recipes.world(tmp_path)
    alone = apportion(folder, "--only", "reward")
    assert alone.code == 2 and "stage reward: model" in alone.err and "stage sft has not made" in alone.err
    assert not (folder / "chain" / "reward").exists()


def test_a_failed_stage_keeps_its_message_and_code_and_goes_on_when_it_is_fixed(tmp_path: Path) -> None:
    folder = tiny_recipes.world(tmp_path)
    failed = apportion(folder, "--set", "sft.max_length=1000000")
    assert failed.code == 2 and "max_length: got 1000000" in failed.err and "Traceback" not in failed.err
    assert state(folder)["sft"]["status"] == "failed" and state(folder)["split"]["status"] == "finished"
    fixed = apportion(folder, "--only", "split,sft")
    fixed.assert_done()
    assert state(folder)["sft"]["status"] == "finished"


def test_a_signal_ends_the_current_stage_after_its_step_and_the_same_command_resumes(tmp_path: Path) -> None:
    folder = tiny_recipes.world(tmp_path)
    words = ["run", "recipe.yaml", "--set", "rankings=rankings.jsonl", "--set", "ppo.steps=100"]
    command = [sys.executable, "-m", "apportion", *words, "--set", "ppo.checkpoint_every=1"]
    environment = os.environ | ENVIRONMENT
    process = subprocess.Popen(command, cwd=folder, env=environment, stderr=subprocess.PIPE, text=True)
    log = folder / "chain" / "ppo" / "metrics.jsonl"
    until = time.monotonic() + 240
    while time.monotonic() < until and (not log.exists() or log.read_text().count("\n") < 3):
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    err = process.communicate(timeout=60)[1]
    assert process.returncode == 143, err
    assert state(folder)["ppo"]["status"] == "interrupted" and "same command resumes" in err
    steps = log.read_text().count("\n")
    assert 3 <= steps < 100
    resumed = run_python(*command[1:], "--only", "ppo", cwd=folder, timeout=300)
    resumed.assert_done()
    assert "apportion: resuming from" in resumed.err and len(tiny_runs.read_lines(log)) == 100


def test_a_dry_run_shows_settings_counts_time_and_memory_and_makes_nothing(tmp_path: Path, light: Server) -> None:
    folder = tiny_recipes.world(tmp_path)
    words = ["run", "recipe.yaml", "--set", "rankings=rankings.jsonl", "--dry_run", "--set", "ppo.optim.lr=0.02"]
    shown = light.run(*words, cwd=folder)
    shown.assert_done()
    assert "# ppo: apportion rl" in shown.out and "lr: 0.02" in shown.out
    assert "data: rankings.jsonl: 40 rows" in shown.err and "rankings.jsonl: 34 rows" in shown.err
    assert "GFLOP/s" in shown.err and "in all about" in shown.err and "GB" in shown.err
    assert not (folder / "chain").exists()


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_of_the_project_dry_runs_without_a_network(path: Path, tmp_path: Path, light: Server) -> None:
    tiny_recipes.rankings(tmp_path / "rows.jsonl", 200)
    given = [word for name in GIVEN.get(path.stem, ()) for word in ("--set", f"{name}=rows.jsonl")]
    shown = light.run("run", path, *given, "--dry_run", cwd=tmp_path)
    shown.assert_done()
    recipe = read_recipe(str(path))
    assert recipe.head.description and recipe.head.expect.result
    assert all(f"# {one.name}: apportion {one.kind}" in shown.out for one in recipe.stages)
    assert list(tmp_path.iterdir()) == [tmp_path / "rows.jsonl"]


def test_the_issues_recipes_are_there() -> None:
    assert {path.stem for path in RECIPES} >= {"imdb-abc", "oasst-ppo", "tldr", "hh", "gsm8k-grpo"}


def test_the_help_names_every_stage_and_what_it_gives(light: Server, tmp_path: Path) -> None:
    shown = light.run("run", "--help", cwd=tmp_path)
    assert shown.code == 0 and shown.loads_nothing
    assert all(f"\n  {name} " in shown.out for name in KINDS) and "held_out_prompts" in shown.out


def test_references_are_replaced_with_their_types(world: Path) -> None:
    recipe = read_recipe(str(world / "recipe.yaml"))
    recipe = recipe._replace(variables=recipe.variables | {"rankings": ["a.jsonl", "b.jsonl"]})
    stages = {stage.name: stage for stage in resolve(recipe)}
    assert stages["split"].config.data == ["a.jsonl", "b.jsonl"]
    assert stages["ppo"].config.steps == 2 and stages["ppo"].uses == ("sft", "reward", "split")
    assert stages["ppo"].config.policy == str(world / "chain" / "sft" / "final")
