"""sft and dpo after kills, signals, damage and full disks: the loss curve of the run that was left alone."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_runs
import torch
import trainer_runs
from benchmarks.faults.compare import difference, traces
from commands import Server
from transformers.trainer_pt_utils import safe_globals

from apportion.cli.arguments import parse
from apportion.config import DPOConfig, SFTConfig
from apportion.errors import ConfigError, DiskError, Interrupted, ScoreError
from apportion.stages.dpo import train as dpo
from apportion.stages.sft import train as sft
from apportion.system import disk
from apportion.training.checkpoint import MANIFEST, check
from apportion.training.run_folder import RunFolder
from apportion.training.trainer import callback

SAME = {"weights": True, "logs": True, "rows_lost": 0, "rows_doubled": 0}
STAGES: dict[str, tuple[Any, Any, str]] = {
    "sft": (SFTConfig, sft, "demonstrations"),
    "dpo": (DPOConfig, dpo, "pairs"),
}


class Stopped(Exception):
    """What a test raises in the middle of a run, as a lost connection would."""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trainer_runs.world(tmp_path_factory.mktemp("world"))


def train(world: Path, output: Path, name: str = "sft", **changes: Any) -> Any:
    on_step = changes.pop("on_step", lambda *rest: None)
    kind, stage, rows = STAGES[name]
    more = {"batch_size": 4, "micro_batch": 2, "steps": 5, "checkpoint_every": 1}
    flags = trainer_runs.flags(world, world / f"{rows}.jsonl", output, **more | changes)
    return stage.train(parse(kind, name, flags).config, on_step=on_step)


def stop_after(last: int) -> Callable[..., None]:
    def on_step(step: int, *rest: Any) -> None:
        if step == last:
            raise Stopped

    return on_step


@pytest.fixture(scope="module")
def whole(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of sft that was left alone."""
    run: Path = train(world, tmp_path_factory.mktemp("whole") / "run").path
    return run


@pytest.mark.parametrize(
    ("name", "changes"),
    [("sft", {"lora.rank": 0}), ("dpo", {}), ("dpo", {"lora.rank": 0, "steps": 9}), ("sft", {"packing": "true"})],
    ids=["sft, all weights", "dpo, adapters", "dpo, all weights, two passes", "sft, packed"],
)
def test_a_stopped_run_ends_as_one_that_was_left_alone(
    world: Path, tmp_path: Path, name: str, changes: dict[str, Any]
) -> None:
    run, alone = tmp_path / "run", tmp_path / "alone"
    train(world, alone, name, **changes)
    with pytest.raises(Stopped):
        train(world, run, name, on_step=stop_after(3), **changes)
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"step-1", "step-2"}
    steps: list[int] = []
    train(world, run, name, on_step=lambda step, *rest: steps.append(step), **changes)
    assert steps[0] == 3 and difference(traces(alone), traces(run)) == SAME
    status = json.loads((run / "status.json").read_text())
    assert status["resumed_from"] == 2 and status["status"] == "finished"


def test_a_checkpoint_is_sealed_and_holds_nothing_that_must_be_unpickled_freely(world: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(world, run, keep_checkpoints=3)
    folder = run / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["step-2", "step-3", "step-4"]
    files = set(check(folder / "step-4"))
    assert "trainer_state.json" in files and "training_args.bin" not in files
    for name in (one for one in files if one.endswith((".pt", ".pth"))):
        with safe_globals():  # numpy's arrays, for its random state
            torch.load(folder / "step-4" / name, weights_only=True)


@pytest.mark.parametrize("how", ["flipped", "missing", "unsealed"])
def test_a_damaged_checkpoint_is_passed_over_and_named(
    world: Path, whole: Path, tmp_path: Path, how: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    with pytest.raises(Stopped):
        train(world, run, on_step=stop_after(4))
    newest = run / "checkpoints" / "step-3"
    if how == "unsealed":  # killed while the trainer wrote it
        (newest / MANIFEST).unlink()
        newest.rename(newest.with_name("checkpoint-3"))
    elif how == "missing":
        (newest / "optimizer.pt").unlink()
    else:
        content = bytearray((newest / "optimizer.pt").read_bytes())
        content[len(content) // 2] ^= 1
        (newest / "optimizer.pt").write_bytes(content)
    train(world, run)
    assert difference(traces(whole), traces(run)) == SAME
    assert json.loads((run / "status.json").read_text())["resumed_from"] == 2
    err = capsys.readouterr().err
    assert ("optimizer.pt" in err) == (how != "unsealed") and "resuming from" in err
    assert not list((run / "checkpoints").glob("checkpoint-*"))


def test_where_no_checkpoint_is_good_nothing_is_started_over(world: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with pytest.raises(Stopped):
        train(world, run, on_step=stop_after(2))
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(DiskError, match="step-1 was there"):
        train(world, run)


def test_other_settings_and_a_finished_run(world: Path, whole: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(whole, tmp_path / "run"))
    with pytest.raises(ConfigError, match=r"optim.lr 0.02.*optim.lr was 0.01"):
        train(world, run, **{"optim.lr": 0.02})
    steps: list[int] = []
    train(world, run, on_step=lambda step, *rest: steps.append(step))
    assert steps == []


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Take SIGINT as Python does by itself, also where the tests run in the background of a shell."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(("number", "code", "last"), [(signal.SIGINT, 130, 2), (signal.SIGTERM, 143, 5)])
def test_a_signal_lets_the_step_be_finished(
    world: Path, whole: Path, tmp_path: Path, interruptible: None, number: int, code: int, last: int
) -> None:
    """After the signal one more step is made, or none is left and the last one has its checkpoint."""
    run = tmp_path / "run"

    def on_step(step: int, *rest: Any) -> None:
        if step == last - 1:
            os.kill(os.getpid(), number)

    with pytest.raises(Interrupted) as caught:
        train(world, run, on_step=on_step, checkpoint_every=0)
    assert caught.value.code == code and f"after step {last} of 5" in str(caught.value)
    assert [path.name for path in (run / "checkpoints").iterdir()] == [f"step-{last}"]
    assert json.loads((run / "status.json").read_text())["status"] == "interrupted"
    train(world, run, checkpoint_every=0)
    assert difference(traces(whole), traces(run)) == SAME


def test_a_real_kill(heavy: Server, world: Path, tmp_path: Path) -> None:
    """SIGKILL in the middle of the command, which then ends as one that was left alone."""
    more = {"batch_size": 2, "micro_batch": 2, "steps": 60, "checkpoint_every": 2}
    words = {
        name: ["dpo", *trainer_runs.flags(world, world / "pairs.jsonl", tmp_path / name, **more)]
        for name in ("run", "alone")
    }
    heavy.fork(*words["alone"], cwd=tmp_path).assert_done()

    def kill() -> None:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and not list((tmp_path / "run" / "checkpoints").glob("step-*")):
            time.sleep(0.01)
        heavy.kill()

    killer = threading.Thread(target=kill)
    killer.start()
    heavy.fork(*words["run"], cwd=tmp_path)
    killer.join()
    assert not (tmp_path / "run" / "final").exists()
    heavy.fork(*words["run"], cwd=tmp_path).assert_done()
    assert difference(traces(tmp_path / "alone"), traces(tmp_path / "run")) == SAME
    assert json.loads((tmp_path / "run" / "status.json").read_text())["resumed_from"] >= 2


def test_a_full_disk_is_waited_for_before_a_checkpoint(
    world: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    failures = [errno.ENOSPC, errno.EDQUOT]
    require = callback.require_room

    def full(folder: Path, wanted: int) -> None:
        if failures:
            raise OSError(failures.pop(), "No space left on device")
        require(folder, wanted)

    monkeypatch.setattr(callback, "require_room", full)
    monkeypatch.setattr(disk, "POLL", 0.01)
    train(world, tmp_path / "run", disk_wait=5)
    assert not failures and "paused" in capsys.readouterr().err
    assert difference(traces(whole), traces(tmp_path / "run")) == SAME
    with pytest.raises(OSError, match="No space left"):
        require(tmp_path, 1 << 62)


def test_a_checkpoint_that_cannot_be_written_is_an_error_of_the_disk(
    heavy: Server, world: Path, tmp_path: Path
) -> None:
    """A file may not grow beyond what the log takes: the trainer's own write fails, and leaves nothing half done."""
    more = {"lora.rank": 0, "steps": 3, "checkpoint_every": 1}
    words = ["sft", *trainer_runs.flags(world, world / "demonstrations.jsonl", tmp_path / "run", **more)]
    done = heavy.fork(*words, cwd=tmp_path, largest_file=50_000)
    first = done.err.splitlines(keepends=True)[0]
    assert first.startswith("sft 1/3  loss")
    done.assert_refused("output: got", "checkpoints", "Free some space", before=first)
    assert not list((tmp_path / "run" / "checkpoints").iterdir())
    assert json.loads((tmp_path / "run" / "status.json").read_text())["status"] == "failed"


def test_a_loss_that_is_not_finite_ends_the_run(world: Path, tmp_path: Path) -> None:
    with pytest.raises(ScoreError, match=r"at step \d: got nan|at step \d: got inf"):
        train(world, tmp_path / "run", **{"optim.lr": 1e30, "optim.max_grad_norm": 1e30, "lora.rank": 0})
    assert RunFolder(tmp_path / "run", "sft").read("status.json")["status"] == "failed"


def test_the_weights_of_another_process_state_do_not_matter(world: Path, whole: Path, tmp_path: Path) -> None:
    """What ran before in this process, and the numbers that it drew, change nothing."""
    torch.manual_seed(99)
    torch.rand(7)
    train(world, tmp_path / "run")
    one, other = (tiny_runs.weights(path / "final") for path in (whole, tmp_path / "run"))
    assert all(torch.equal(one[name], other[name]) for name in one)
