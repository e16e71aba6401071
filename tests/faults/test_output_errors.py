"""The run folder: other settings, foreign files, damage, and a finished or an interrupted run that is run again."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from commands import Server

Command = Callable[..., Any]


def steps_in(file: Path) -> list[int]:
    """Return the step of every line of a JSON-lines file."""
    return [json.loads(line)["step"] for line in file.read_text().splitlines()]


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Return the bytes and the time of change of every file under `folder`."""
    return {str(p): (p.read_bytes(), p.stat().st_mtime_ns) for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture
def finished(model_command: Command, tmp_path: Path, rl_flags: list[str]) -> Path:
    """Return the folder `run` of a finished run of `rl_flags`."""
    model_command("rl", *rl_flags).assert_done()
    return tmp_path / "run"


def test_a_finished_run_is_reused(command: Command, finished: Path, rl_flags: list[str]) -> None:
    before = contents(finished)
    again = command("rl", *rl_flags)
    again.assert_done()
    assert again.out == "run\n" and again.loads_nothing
    assert contents(finished) == before


def test_another_configuration_is_refused_by_its_key(
    model_command: Command, command: Command, finished: Path, rl_flags: list[str]
) -> None:
    before = contents(finished)
    other = command("rl", *rl_flags, "--steps", 3)
    assert other.code == 2 and other.loads_nothing and contents(finished) == before
    assert "output: got 'run with steps 3'; expected the settings of the run in it (steps was 2)" in other.err
    nested = command("rl", *rl_flags, "--credit.mix", 0.5)
    assert nested.code == 2 and "credit" in nested.err and "mix" in nested.err and "pass --fresh" in nested.err
    model_command("rl", *rl_flags, "--steps", 3, "--fresh").assert_done()
    assert steps_in(finished / "metrics.jsonl") == [1, 2, 3]


def test_the_folder_of_another_stage_is_refused(command: Command, finished: Path, world: Path) -> None:
    done = command("reward", "--model", world / "policy", "--data", world / "reviews.csv", "--output", "run")
    assert done.code == 2 and "output: got 'run of `apportion rl`'; expected a folder of `apportion reward`" in done.err
    assert done.loads_nothing and (finished / "final").is_dir()


@pytest.mark.parametrize("switch", [[], ["--fresh"]])
def test_what_is_no_run_is_never_touched(
    command: Command, tmp_path: Path, rl_flags: list[str], switch: list[str]
) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "status.json").write_text("{}")
    (tmp_path / "thesis" / "thesis.tex").write_text("mine")
    before = contents(tmp_path)
    file = command("rl", *rl_flags, *switch, "--output", "file")
    file.assert_refused_early("output: got 'file'", "a folder", "It is a file: choose another name")
    command("rl", *rl_flags, *switch, "--output", "file/run").assert_refused_early(
        "output: got 'file/run", "Not a directory"
    )
    foreign = command("rl", *rl_flags, *switch, "--output", "thesis")
    foreign.assert_refused_early("output: got 'thesis'", "a new folder or one of this run", "Choose another --output")
    assert contents(tmp_path) == before


@pytest.mark.parametrize("name", ["config.yaml", "status.json"])
def test_a_damaged_run_folder_is_named_and_fresh_fixes_it(
    model_command: Command, command: Command, finished: Path, rl_flags: list[str], name: str
) -> None:
    (finished / name).write_text("{[")
    done = command("rl", *rl_flags)
    assert done.code == 2 and "Traceback" not in done.err and done.loads_nothing
    assert f"run/{name}" in done.err and "pass --fresh" in done.err
    model_command("rl", *rl_flags, "--fresh").assert_done()


def test_evaluate_wants_a_finished_run_of_rl(command: Command, tmp_path: Path, finished: Path, world: Path) -> None:
    (tmp_path / "file").write_text("")
    for name in ("absent", "file", str(world)):
        done = command("evaluate", "--run", name)
        assert done.code == 2 and done.loads_nothing and "run: got" in done.err and "Train one with" in done.err
    status = finished / "status.json"
    stored = status.read_text()
    for old, new in (('"finished"', '"running"'), ('"rl"', '"reward"')):
        status.write_text(stored.replace(old, new, 1))
        done = command("evaluate", "--run", "run")
        assert done.code == 2 and "expected the folder of a finished `apportion rl` run" in done.err
    status.write_text(stored)
    done = command("evaluate", "--run", "run", "--prompts", "absent.jsonl")
    assert done.code == 2 and done.loads_nothing and "prompts: got 'absent.jsonl'" in done.err
    assert not (finished / "evaluation.json").exists()


def test_evaluate_works_on_it(model_command: Command, finished: Path, world: Path) -> None:
    given = ("--prompts", world / "prompts.jsonl", "--judge", "false", "--count", 4)
    model_command("evaluate", "--run", "run", *given).assert_done()
    assert json.loads((finished / "evaluation.json").read_text())["prompts"] == 4


def test_a_killed_run_resumes_without_gap_or_repetition(
    heavy: Server, model_command: Command, tmp_path: Path, rl_flags: list[str]
) -> None:
    flags = [*rl_flags, "--steps", "40", "--checkpoint_every", "3"]
    run = tmp_path / "run"
    with ThreadPoolExecutor(1) as pool:
        killed = pool.submit(heavy.fork, "rl", *flags, cwd=tmp_path)
        while not (run / "checkpoints" / "step-6" / "progress.json").is_file():
            assert not killed.done(), ("the run ended before it could be killed", killed.result())
            time.sleep(0.005)
        heavy.kill()
        assert killed.result().code == -signal.SIGKILL
    assert not (run / "final").exists() and json.loads((run / "status.json").read_text())["status"] == "running"
    with (run / "metrics.jsonl").open("a") as file:  # as if it had been killed in the middle of a line
        file.write('{"step": 99, "obj')
    model_command("rl", *flags).assert_done()
    assert steps_in(run / "metrics.jsonl") == list(range(1, 41))
    assert sorted(set(steps_in(run / "rollouts.jsonl"))) == list(range(1, 41))
    assert len(steps_in(run / "rollouts.jsonl")) == 4 * 40
    model_command("rl", *flags, "--output", "whole").assert_done()
    for mine, theirs in zip(*(read(tmp_path / name / "metrics.jsonl") for name in ("run", "whole")), strict=True):
        assert mine == theirs


def read(file: Path) -> list[dict[str, float]]:
    """Return the lines of a metrics.jsonl without what a clock and a process say."""
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith(("time/", "memory/"))} for row in rows]
