"""Resuming after damaged checkpoints, lost logs and signals: bitwise equal to the uninterrupted run."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_runs
import torch
from benchmarks.faults.compare import difference, traces

from apportion.cli.arguments import parse
from apportion.cli.main import main, resume_command
from apportion.config import RewardConfig
from apportion.errors import ConfigError, DiskError, Interrupted
from apportion.stages.reward import final
from apportion.stages.reward import train as reward
from apportion.stages.rl import train as rl
from apportion.system import disk
from apportion.training import rng
from apportion.training.checkpoint import MANIFEST, PROGRESS, Damaged, check, load_latest, manifest, save_checkpoint
from apportion.training.reproducibility import check_devices, deterministic_kernels
from apportion.training.run_folder import RunFolder
from apportion.training.signals import Signals
from apportion.training.state import Tensors

FILES = (
    MANIFEST,
    PROGRESS,
    *(f"{name}.safetensors" for name in ("weights", "optimizer", "state", "monitors", "random")),
)
SAME = {"weights": True, "logs": True, "rows_lost": 0, "rows_doubled": 0}
ADAPTIVE = "[attention: {mix: 0.7}, kl_penalty: {coef: 0.1, target: 0.5, horizon: 20}]"
HERE = Path(__file__).parent
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}


class Stopped(Exception):
    """What a test raises in the middle of a run, as a lost connection would."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_runs.world(tmp_path_factory.mktemp("models"))


def settings(models: Path, output: Path, **changes: Any) -> Any:
    more = {"steps": 4, "checkpoint_every": 1, "credit": ADAPTIVE, "ppo.epochs": 1, "log_rollouts": 2, "compare": "[]"}
    return tiny_runs.config(models, output, **more | changes)


def stop_after(last: int) -> Any:
    def on_step(step: int, *rest: Any) -> None:
        if step == last:
            raise Stopped

    return on_step


@pytest.fixture(scope="module")
def whole(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was left alone."""
    return rl.train(settings(models, tmp_path_factory.mktemp("whole") / "run")).path


@pytest.fixture(scope="module")
def stopped(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that ended after step 3, with checkpoints of steps 2 and 3; copied by those who damage it."""
    path = tmp_path_factory.mktemp("stopped") / "run"
    with pytest.raises(Stopped):
        rl.train(settings(models, path), on_step=stop_after(3))
    return path


@pytest.fixture
def run(stopped: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(stopped, tmp_path / "run"))


def resumed(models: Path, run: Path, whole: Path) -> int:
    """Resume `run`, check that it ends as `whole`, and return the step that it resumed from."""
    rl.train(settings(models, run))
    assert difference(traces(whole), traces(run)) == SAME
    return int(json.loads((run / "status.json").read_text()).get("resumed_from", 0))


def damage(path: Path, how: str) -> None:
    content = bytearray(path.read_bytes())
    if how == "missing":
        path.unlink()
    elif how == "truncated":
        path.write_bytes(content[: len(content) // 2])
    else:
        content[len(content) // 2] ^= 1
        path.write_bytes(content)


@pytest.mark.parametrize("how", ["truncated", "flipped", "missing"])
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_named_and_the_one_before_it_taken(
    models: Path, run: Path, whole: Path, name: str, how: str, capsys: pytest.CaptureFixture[str]
) -> None:
    newest = run / "checkpoints" / "step-3"
    assert {p.name for p in newest.iterdir()} == set(FILES), "every file of a checkpoint is tried"
    damage(newest / name, how)
    assert resumed(models, run, whole) == 2
    err = capsys.readouterr().err
    assert f"checkpoint {newest} cannot be used: {name} " in err
    assert f"resuming from {run / 'checkpoints' / 'step-2'}." in err


def test_every_byte_of_a_manifest_counts(stopped: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(stopped / "checkpoints" / "step-3", tmp_path / "step-3"))
    content = (copy / MANIFEST).read_bytes()
    assert manifest(copy).encode() == content
    for place in range(len(content)):
        (copy / MANIFEST).write_bytes(content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :])
        with pytest.raises(Damaged, match="manifest.json"):
            check(copy)
    (copy / MANIFEST).write_bytes(content)
    check(copy)


def test_where_none_is_good_nothing_is_started_over(models: Path, run: Path) -> None:
    for step in (2, 3):
        damage(run / "checkpoints" / f"step-{step}" / "weights.safetensors", "flipped")
    log = (run / "metrics.jsonl").read_bytes()
    with pytest.raises(DiskError, match=r"checkpoints: got .*step-3: weights.*step-2: weights.*--fresh to start over"):
        rl.train(settings(models, run))
    assert (run / "metrics.jsonl").read_bytes() == log and not (run / "final").exists()
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(DiskError, match="step-3 was there"):
        rl.train(settings(models, run))
    assert json.loads((run / "status.json").read_text())["status"] == "failed"
    steps: list[int] = []
    rl.train(settings(models, run), fresh=True, on_step=lambda step, total, found: steps.append(step))
    assert steps == [1, 2, 3, 4]


def test_logs_that_lost_their_end_take_the_run_back_to_where_they_have_it(
    models: Path, run: Path, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = run / "metrics.jsonl"
    lines = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(b"".join(lines[:2]) + lines[2][:10])
    assert resumed(models, run, whole) == 2
    assert "step-3 cannot be used: metrics.jsonl has " in capsys.readouterr().err


def test_a_run_does_not_resume_from_logs_with_a_changed_end(models: Path, run: Path, whole: Path) -> None:
    log = run / "rollouts.jsonl"
    content = log.read_bytes()
    log.write_bytes(content[:-50] + bytes(50))  # what a crash of the machine leaves of what it had not written yet
    assert resumed(models, run, whole) == 2
    log.unlink()
    (run / "status.json").write_text((run / "status.json").read_text().replace("finished", "running"))
    with pytest.raises(DiskError, match=r"rollouts.jsonl has 0 of the \d+ bytes"):
        rl.train(settings(models, run))


def test_a_checkpoint_that_was_passed_over_is_never_taken_later(models: Path, run: Path, whole: Path) -> None:
    """Its logs were short; the run is resumed and stopped before it writes that step's checkpoint again."""
    log = run / "metrics.jsonl"
    log.write_bytes(b"".join(log.read_bytes().splitlines(keepends=True)[:2]))
    with pytest.raises(Stopped):
        rl.train(settings(models, run, checkpoint_every=4), on_step=stop_after(3))
    assert {p.name for p in (run / "checkpoints").iterdir()} == {"step-2", "step-3.damaged"}
    assert resumed(models, run, whole) == 2


def test_a_kill_while_a_folder_takes_anothers_place_loses_neither(tmp_path: Path) -> None:
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    final = tmp_path / "final"
    disk.replace_durably(tmp_path / "old", final)
    os.replace(final, disk.backup_of(final))  # as if killed between the two renames
    disk.recover(final)
    assert (final / "file").read_text() == "old"
    disk.replace_durably(tmp_path / "new", final)
    assert [p.name for p in tmp_path.iterdir()] == ["final"] and (final / "file").read_text() == "new"


def test_a_run_that_was_killed_while_it_was_opened_begins(models: Path, tmp_path: Path) -> None:
    for left in ({}, {".status.json.tmp": ""}, {"status.json": '{"stage": "rl", "status": "running"}'}):
        folder = tmp_path / f"run-{len(left)}-{'status.json' in left}"
        folder.mkdir()
        for name, text in left.items():
            (folder / name).write_text(text)
        assert RunFolder.open(str(folder), "rl", {"steps": 1}).is_run
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "status.json").write_text("{}")
    with pytest.raises(ConfigError, match="a new folder"):
        RunFolder.open(str(tmp_path / "mine"), "rl", {"steps": 1})


def test_all_random_states_are_put_back() -> None:
    def draw() -> list[float]:
        return [random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), float(torch.randn(()))]

    rng.seed(3)
    draw()  # both gauss methods keep a second number
    stored = {name: state.clone() for name, state in rng.states().items()}
    expected = draw()
    rng.seed(4)
    rng.restore(stored)
    assert draw() == expected


def test_what_changes_a_run_bitwise_is_a_warning(
    models: Path, run: Path, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    newest = run / "checkpoints" / "step-3"
    progress = json.loads((newest / PROGRESS).read_text())
    assert progress["run_environment"]["threads"] == 1 and progress["run_environment"]["deterministic"] is True
    progress["run_environment"]["torch"] = "1.0"
    (newest / PROGRESS).write_text(json.dumps(progress))
    (newest / MANIFEST).write_text(manifest(newest))
    assert resumed(models, run, whole) == 3
    err = capsys.readouterr().err
    assert "not be bitwise those of an uninterrupted run" in err
    assert f"torch was '1.0' and is {torch.__version__!r}." in err


def test_a_run_resumes_with_its_number_of_threads(models: Path, run: Path, whole: Path) -> None:
    torch.set_num_threads(2)
    try:
        assert resumed(models, run, whole) == 3
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(1)


def test_another_model_under_a_checkpoint_is_refused(models: Path, run: Path, tmp_path: Path) -> None:
    config = settings(models, run)
    config.lora.rank = 2
    (run / "config.yaml").write_text((run / "config.yaml").read_text().replace("rank: 4", "rank: 2"))
    with pytest.raises(ConfigError, match="checkpoint: got .*of other shapes.*the model that the run started from"):
        rl.train(config)


def test_a_run_resumes_on_its_kind_of_device_only(models: Path, run: Path) -> None:
    newest = run / "checkpoints" / "step-3"
    progress = json.loads((newest / PROGRESS).read_text())
    progress["run_environment"]["device of policy"] = "NVIDIA H200"
    (newest / PROGRESS).write_text(json.dumps(progress))
    (newest / MANIFEST).write_text(manifest(newest))
    log = (run / "metrics.jsonl").read_bytes()
    with pytest.raises(ConfigError, match=r"device \(device of policy\): got 'cpu'; expected cuda.* --device cuda"):
        rl.train(settings(models, run))
    assert (run / "metrics.jsonl").read_bytes() == log
    check_devices({"device of policy": "NVIDIA A100"}, {"device of policy": "NVIDIA H200"})


def test_a_file_that_no_manifest_names_is_not_read(models: Path, run: Path, whole: Path) -> None:
    (run / "checkpoints" / "step-3" / "._weights.safetensors").write_bytes(b"what another system leaves beside a file")
    assert resumed(models, run, whole) == 3


class Two:
    """Holds one tensor under two names, a part of another, and one that learns."""

    def __init__(self) -> None:
        one = torch.arange(6.0).reshape(2, 3)
        self.state = {
            "one": one,
            "again": one,
            "part": one[:, 1],
            "turned": one.T,
            "learns": torch.ones(2).requires_grad_(),
        }

    is_sharded = False

    def state_dict(self) -> Tensors:
        return {"state": self.state}

    def load_state_dict(self, stored: Tensors) -> None:
        self.state = stored["state"]

    def models_by_name(self) -> dict[str, Any]:
        return {}


def test_tensors_that_share_memory_are_kept(tmp_path: Path) -> None:
    run, held = RunFolder.open(str(tmp_path / "run"), "rl", {}), Two()
    before = {name: tensor.detach().clone() for name, tensor in held.state.items()}
    save_checkpoint(run, held, 1, keep=1)
    assert load_latest(run, held) == 1 and held.state.keys() == before.keys()
    assert all(torch.equal(held.state[name], tensor) for name, tensor in before.items())


def test_a_disk_that_is_full_when_the_logs_are_synced_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, sync, failures = RunFolder.open(str(tmp_path / "run"), "rl", {}), disk.sync, [errno.EDQUOT, errno.ENOSPC]
    run.log(1, {"a": 1.0})
    run.disk_wait = 5.0
    synced: list[Path] = []

    def full(path: Path) -> None:
        if path.name == "metrics.jsonl" and failures:
            raise OSError(failures.pop(), "full")
        synced.append(path)
        sync(path)

    monkeypatch.setattr(disk, "sync", full)
    monkeypatch.setattr(disk, "POLL", 0.01)
    save_checkpoint(run, Two(), 1, keep=1)
    assert not failures and "paused" in capsys.readouterr().err
    assert load_latest(run, Two()) == 1
    order = [path.name for path in synced]
    # the names of the logs and of checkpoints/, then those in it
    assert order.index("run") < order.index("checkpoints") and (tmp_path / "run" / "checkpoints").is_dir()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_states_go_back_to_their_device(tmp_path: Path) -> None:
    run, held = RunFolder.open(str(tmp_path / "run"), "rl", {}), Two()
    held.state["there"] = torch.ones(2, device="cuda")
    save_checkpoint(run, held, 1, keep=1)
    load_latest(run, held)
    assert held.state["there"].device.type == "cuda" and held.state["one"].device.type == "cpu"


def test_a_final_save_that_fails_leaves_nothing_and_reports_the_size_needed(
    models: Path, run: Path, whole: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    left: list[list[str]] = []

    def full(model: Any, folder: Path, *rest: Any, **more: Any) -> None:
        Path(folder).mkdir()
        (Path(folder) / "model.safetensors").write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    def wait(path: Path, wanted: int, *rest: Any) -> None:
        left.append(sorted(p.name for p in run.glob("*final*")) + sorted(p.name for p in run.glob(".*final*")))
        left.append([str(wanted)])

    monkeypatch.setattr("transformers.PreTrainedModel.save_pretrained", full)
    monkeypatch.setattr(disk, "_wait", wait)
    with pytest.raises(DiskError):
        rl.train(settings(models, run, disk_wait=0.2))
    weights = sum(t.numel() for t in tiny_runs.weights(whole / "final").values())
    assert left[0] == [] and 4 * weights <= int(left[1][0]) < 8 * weights
    monkeypatch.undo()
    assert resumed(models, run, whole) == 3


# the reward stage


def reward_config(models: Path, output: Path, **changes: Any) -> RewardConfig:
    chosen = {"model": models / "policy", "data": models / "reviews.csv", "output": output, "excerpts": 40}
    chosen |= {"excerpt_tokens": "[4, 12]", "batch_size": 8, "probe_excerpts": 20, "lora.rank": 4, "dtype": "float32"}
    chosen |= {"checkpoint_every": 2, "device": "cpu"} | changes
    return parse(RewardConfig, "reward", [str(w) for k, v in chosen.items() for w in (f"--{k}", v)]).config


@pytest.mark.parametrize(
    "changes",
    [{}, {"lora.rank": 0, "dtype": "bfloat16", "optim.moments": "bfloat16"}],
    ids=["adapters", "all weights in 16 bit"],
)
def test_a_reward_model_resumes_too(models: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    whole = reward.train(reward_config(models, tmp_path / "whole", **changes)).path
    run = tmp_path / "run"
    with pytest.raises(Stopped):
        reward.train(reward_config(models, run, **changes), on_step=stop_after(3))
    steps: list[int] = []
    reward.train(reward_config(models, run, **changes), on_step=lambda step, *rest: steps.append(step))
    assert steps == [3, 4, 5] and difference(traces(whole), traces(run)) == SAME
    assert (whole / "final" / "reward.json").read_bytes() == (run / "final" / "reward.json").read_bytes()
    assert json.loads((run / "status.json").read_text())["resumed_from"] == 2


def test_a_reward_model_of_rankings_resumes_too(models: Path, tmp_path: Path) -> None:
    rows = [{"prompt": f"Film {i}:", "completions": [" good", " so so", " bad"], "ranks": [1, 2, 3]} for i in range(40)]
    for name, part in (("train", rows), ("test", rows[:4])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    changes = {"data": tmp_path / "train.jsonl", "test_data": tmp_path / "test.jsonl", "preferences.epochs": 2}
    whole = reward.train(reward_config(models, tmp_path / "whole", **changes)).path
    run = tmp_path / "run"
    with pytest.raises(Stopped):
        reward.train(reward_config(models, run, **changes), on_step=stop_after(7))
    steps: list[int] = []
    reward.train(reward_config(models, run, **changes), on_step=lambda step, *rest: steps.append(step))
    assert steps == [7, 8, 9, 10] and difference(traces(whole), traces(run)) == SAME
    for name in ("reward.json", "config.json", "model.safetensors"):
        assert (whole / "final" / name).read_bytes() == (run / "final" / name).read_bytes()


def test_a_reward_model_has_its_name_when_all_of_it_is_there(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, evaluate = tmp_path / "run", final.evaluate

    def killed(folder: Path, *rest: Any) -> Any:
        assert (folder / "model.safetensors").is_file() and folder != run / "final"
        raise Stopped

    monkeypatch.setattr(final, "evaluate", killed)
    with pytest.raises(Stopped):
        reward.train(reward_config(models, run))
    assert not (run / "final").exists() and not RunFolder(run, "reward").finished
    monkeypatch.setattr(final, "evaluate", evaluate)
    steps: list[int] = []
    reward.train(reward_config(models, run), on_step=lambda step, *rest: steps.append(step))
    assert steps == [5] and not (run / "final.tmp").exists() and (run / "final" / "reward.json").is_file()


# signals


@pytest.fixture(autouse=True)
def interruptible() -> Iterator[None]:
    """Take SIGINT as Python does by itself, also where the tests run in the background of a shell."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_lets_the_batch_be_finished(models: Path, tmp_path: Path, whole: Path, number: int, code: int) -> None:
    run, before = tmp_path / "run", signal.getsignal(number)

    def on_step(step: int, steps: int, metrics: dict[str, float]) -> None:
        if step == 1:
            os.kill(os.getpid(), number)
            os.kill(os.getpid(), number)  # a terminal and a launcher both pass it on: one request

    with pytest.raises(Interrupted) as end:
        rl.train(settings(models, run, checkpoint_every=0), on_step=on_step)
    assert end.value.code == code and signal.getsignal(number) == before
    assert json.loads((run / "status.json").read_text())["status"] == "interrupted"
    assert [p.name for p in (run / "checkpoints").iterdir()] == ["step-2"]
    assert resumed(models, run, whole) == 2


def test_a_signal_after_the_last_batch_has_its_checkpoint_too(models: Path, tmp_path: Path, whole: Path) -> None:
    run = tmp_path / "run"

    def on_step(step: int, steps: int, metrics: dict[str, float]) -> None:
        if step == 4:  # its checkpoint, if any, is written already
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted, match="after step 4 of 4"):
        rl.train(settings(models, run, checkpoint_every=0), on_step=on_step)
    assert not (run / "final").exists() and [p.name for p in (run / "checkpoints").iterdir()] == ["step-4"]
    assert resumed(models, run, whole) == 4


def test_a_signal_that_is_ignored_stays_so() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with Signals(lambda line: None) as signals:
        signals.in_training = True
        os.kill(os.getpid(), signal.SIGINT)
        assert not signals
    assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN


def test_the_command_that_resumes_is_printed(tmp_path: Path, rl_flags: list[str]) -> None:
    """The real command, from its start, with SIGTERM as a cluster sends it; then the printed command."""
    flags = [*rl_flags, "--steps", "400", "--fresh"]
    process = subprocess.Popen(
        [sys.executable, "-m", "apportion", "rl", *flags],
        cwd=tmp_path,
        env=os.environ | ENVIRONMENT,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 90
    while not (tmp_path / "run" / "metrics.jsonl").exists() and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    err = process.communicate(timeout=60)[1]
    assert process.returncode == 143 and "Traceback" not in err
    assert "SIGTERM: finishing this batch and writing a checkpoint" in err
    printed = err.strip().splitlines()[-1].strip()
    assert printed == resume_command(["rl", *flags])
    assert printed.startswith("apportion rl ") and "--fresh" not in printed
    assert len(list((tmp_path / "run" / "checkpoints").glob("step-*"))) == 1


TWICE = """
import os, signal, sys, time
from apportion.training.signals import Signals
signal.signal(signal.SIGINT, signal.default_int_handler)
with Signals(lambda line: print(line, end="", flush=True)) as signals:
    try:
        os.kill(os.getpid(), signal.SIGINT)
        print("not reached")
    except KeyboardInterrupt:  # there is no batch to finish
        assert not signals
with Signals(lambda line: print(line, end="", flush=True)) as signals:
    signals.in_training = True
    os.kill(os.getpid(), signal.SIGINT)
    assert signals and signals.caught == signal.SIGINT
    time.sleep(1.1)
    os.kill(os.getpid(), signal.SIGTERM)
    print("not reached")
"""


def test_a_second_signal_stops_at_once(python: Callable[..., Any]) -> None:
    done = python("-c", TWICE)
    assert done.code == -signal.SIGTERM and "apportion: stopped;" in done.out and "not reached" not in done.out


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_processes_end_after_the_same_batch_and_resume(models: Path, tmp_path: Path, number: int) -> None:
    """torchrun passes a signal on; a terminal sends SIGINT to every process as well."""
    run, flags = tmp_path / "run", tiny_runs.flags(models, tmp_path / "run", steps=60, checkpoint_every=50)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    words = [*launcher, "-m", "apportion", "rl", *flags]
    process = subprocess.Popen(words, env=os.environ | ENVIRONMENT, stderr=subprocess.PIPE, start_new_session=True)
    deadline = time.monotonic() + 90
    while not (run / "metrics.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    if number == signal.SIGINT:
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    process.communicate(timeout=60)
    status = json.loads((run / "status.json").read_text())
    assert status["status"] == "interrupted" and 0 < status["checkpoint"] < 50
    done = subprocess.run(words, env=os.environ | ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert [row["step"] for row in tiny_runs.read_lines(run / "metrics.jsonl")] == list(range(1, 61))
    assert json.loads((run / "status.json").read_text())["resumed_from"] == status["checkpoint"]


def test_deterministic_kernels_are_left_as_they_were() -> None:
    with deterministic_kernels(torch.device("cpu")):
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.utils.deterministic.fill_uninitialized_memory  # it would cost a pass over every new tensor
    assert not torch.are_deterministic_algorithms_enabled() and torch.utils.deterministic.fill_uninitialized_memory


def test_a_finished_run_records_what_it_resumed_from(models: Path, run: Path, whole: Path) -> None:
    assert resumed(models, run, whole) == 3
    words = tiny_runs.flags(models, run, steps=4, **{"ppo.epochs": 1, "log_rollouts": 2, "compare": "[]"})
    # how often checkpoints are written is no part of what a run is
    assert main(["rl", *words, "--credit", ADAPTIVE, "--checkpoint_every", "3", "--disk_wait", "1"]) == 0
