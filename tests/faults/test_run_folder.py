"""One run folder: one writer at a time, started over wherever it lies, and a status that says how the run ended."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from apportion.errors import ApportionError, ConfigError, DiskError, ModelError
from apportion.system import disk
from apportion.system.lock import lock_folder
from apportion.training import crash_dump, run_folder
from apportion.training.run_folder import FollowerFolder, RunFolder
from apportion.training.session import explain_out_of_memory

SETTINGS = {"steps": 1, "checkpoint_every": 2, "monitors": {"kl": "warn"}}


def opened(path: Path | str, **more: Any) -> RunFolder:
    return RunFolder.open(str(path), "rl", SETTINGS | more)


def begun(path: Path) -> RunFolder:
    """Return a run that has learned something."""
    run = opened(path)
    run.log(1, {"a": 1.0})
    return run


def in_a_fork(work: Callable[[], object]) -> int:
    """Return how `work` ends in another process: 0, 2 for a ConfigError, 1 for anything else."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        except ConfigError:
            code = 2
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.fixture
def writer(tmp_path: Path) -> Any:
    """Return the number of another process that writes the run in `run`, until it is killed."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        held = opened(tmp_path / "run")
        os.write(write, b"x")
        signal.pause()
        os._exit(held is None)
    os.read(read, 1)
    yield child
    for end in (read, write):
        os.close(end)
    if os.waitpid(child, os.WNOHANG) == (0, 0):
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_another_process_may_not_write_the_same_run(tmp_path: Path, writer: int) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "run")
    for name in ("run", "link"):
        for fresh in (False, True):
            before = {p: p.read_bytes() for p in (tmp_path / "run").iterdir()}
            with pytest.raises(ConfigError, match="output: got .*a run that no other process is writing. Wait for it"):
                RunFolder.open(str(tmp_path / name), "rl", SETTINGS, fresh=fresh)
            assert {p: p.read_bytes() for p in (tmp_path / "run").iterdir()} == before
    assert not RunFolder(tmp_path / "run", "rl").finished, "reading needs no lock"
    FollowerFolder(tmp_path / "run", "rl").write_status("running")
    os.kill(writer, signal.SIGKILL)
    os.waitid(os.P_PID, writer, os.WEXITED | os.WNOWAIT)
    RunFolder.open(str(tmp_path / "run"), "rl", SETTINGS, fresh=True)


def test_one_process_opens_a_run_as_often_as_it_likes_and_lets_go_at_its_end(tmp_path: Path) -> None:
    def other() -> object:
        return opened(tmp_path / "run")

    first, second = opened(tmp_path / "run"), opened(tmp_path / "run")
    assert in_a_fork(other) == 2
    first.write_status("failed")
    assert in_a_fork(other) == 2, "the second holds it still"
    del second
    assert in_a_fork(other) == 0
    third = opened(tmp_path / "run")
    with pytest.raises(ConfigError), third.record_failure():
        raise ConfigError("x")
    assert in_a_fork(other) == 0
    opened(tmp_path / "run").write_status("finished")
    fourth = opened(tmp_path / "run")
    assert fourth.finished and in_a_fork(other) == 0, "a finished run is not written"


def test_a_fork_that_outlives_a_run_holds_no_lock(tmp_path: Path) -> None:
    held = opened(tmp_path / "run")
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.read(read, 1)
        os._exit(0)
    del held
    try:
        assert in_a_fork(lambda: opened(tmp_path / "run")) == 0
    finally:
        os.write(write, b"x")
        os.waitpid(child, 0)


@pytest.mark.parametrize(
    ("code", "reason"), [(errno.ENOLCK, "No locks available"), (errno.ENOSYS, "Function not implemented")]
)
def test_a_disk_without_locks_is_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], code: int, reason: str
) -> None:
    def refused(handle: int, how: int) -> None:
        raise OSError(code, reason)

    monkeypatch.setattr(fcntl, "flock", refused)
    opened(tmp_path / "run")
    assert f"cannot be locked ({reason}): do not start the same run twice" in capsys.readouterr().err


def test_where_no_file_can_be_written_beside_it_the_folder_itself_is_locked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mount point, for instance: there is no room for a lock file beside it."""
    (tmp_path / "run").mkdir()
    real = os.open

    def refused(path: Any, *rest: Any, **more: Any) -> int:
        if str(path).endswith(".lock"):
            raise PermissionError(errno.EACCES, "Permission denied")
        return real(path, *rest, **more)

    monkeypatch.setattr(os, "open", refused)
    held, warning = lock_folder(tmp_path / "run")
    assert held is not None and warning is None and not list(tmp_path.glob(".*.lock"))
    assert lock_folder(tmp_path / "run")[0] is held
    assert in_a_fork(lambda: lock_folder(tmp_path / "run")) == 2


# starting over


@pytest.mark.parametrize("kind", ["link", "link to nothing", "here", "cannot be moved"])
def test_a_run_is_started_over_wherever_it_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    output = folder = tmp_path / "disk" / "run"
    folder.parent.mkdir()
    if kind.startswith("link"):
        output = tmp_path / "link"
        output.symlink_to(folder)
    if kind == "link":
        folder.mkdir()
    run = begun(output)
    (run.path / "checkpoints" / "step-1").mkdir(parents=True)
    (run.path / "stray").symlink_to(run.path / "metrics.jsonl")
    inside = folder.stat().st_ino
    if kind == "here":
        monkeypatch.chdir(folder)
        output = Path(".")
    if kind == "cannot be moved":

        def busy(source: Any, target: Any, move: Any = os.replace) -> None:
            if Path(source) == folder:
                raise OSError(errno.EBUSY, "Device or resource busy")
            move(source, target)

        monkeypatch.setattr(os, "replace", busy)
    again = RunFolder.open(str(output), "rl", {"steps": 5}, fresh=True)
    assert sorted(p.name for p in folder.iterdir()) == ["README.md", "config.yaml", "status.json"]
    assert yaml.safe_load((folder / "config.yaml").read_text()) == {"steps": 5}
    assert not again.started and output.is_symlink() == kind.startswith("link")
    assert kind.startswith("link") or folder.stat().st_ino == inside, "it is emptied where it stands"
    assert {p.name for p in folder.parent.iterdir()} == {"run", ".run.lock"}


def test_a_kill_while_a_folder_is_emptied_leaves_a_run_that_is_not_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun(tmp_path / "run").write_status("finished")
    (tmp_path / "run" / "final").mkdir()
    monkeypatch.chdir(tmp_path / "run")

    class Killed(BaseException):
        pass

    def die(path: Any, *rest: Any, **more: Any) -> None:
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(
            run_folder.shutil, "rmtree", lambda path, ignore_errors=False: None if ignore_errors else die(path)
        )
        with pytest.raises(Killed):
            RunFolder.open(".", "rl", SETTINGS, fresh=True)
    left = RunFolder(tmp_path / "run", "rl")
    assert left.is_run and not left.finished
    assert not RunFolder.open(".", "rl", SETTINGS, fresh=True).started


# how it ended


@pytest.mark.parametrize("error", [MemoryError("no room"), OSError(5, "Input/output error"), KeyError("bug")])
def test_any_error_is_in_the_status(tmp_path: Path, error: Exception) -> None:
    run = opened(tmp_path / "run")
    with pytest.raises(type(error)), run.record_failure():
        raise error
    status = run.read("status.json")
    assert status["status"] == "failed" and status["error"] == f"{type(error).__name__}: {error}"


@pytest.mark.parametrize("setting", ["ppo.micro_batch or ppo.micro_tokens", "micro_batch"])
def test_a_gpu_without_enough_memory_names_the_settings(setting: str) -> None:
    with (
        pytest.raises(ModelError, match=f"device: got 'CUDA out of memory'.*Lower {setting},"),
        explain_out_of_memory(setting),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has …")


def test_a_name_that_is_no_utf8_ends_up_in_status_and_settings(tmp_path: Path) -> None:
    run = opened(tmp_path / "caf\udce9", data="caf\udce9.jsonl")
    with pytest.raises(ConfigError), run.record_failure():
        raise ConfigError("data: got 'caf\udce9'")
    assert run.read("status.json")["error"] == "data: got 'caf\udce9'"
    run.log(1, {"a": 1.0}, [{"text": "\ud83d"}])
    assert json.loads((run.path / "rollouts.jsonl").read_text()) == {"text": "\ud83d"}
    opened(tmp_path / "caf\udce9", data="caf\udce9.jsonl")  # the same settings
    place = tmp_path / "stopped"
    crash_dump.write(place, "caf\udce9\n", ConfigError("caf\udce9"), None, {})
    assert (place / "error.txt").read_text() == "caf\\udce9\n"


def test_settings_that_changed_on_the_way_are_in_config_yaml(tmp_path: Path) -> None:
    begun(tmp_path / "run")
    stored = tmp_path / "run" / "config.yaml"
    changed = {"checkpoint_every": 7, "monitors": {"kl": "stop"}, "max_skipped": 5, "device": "cpu"}
    opened(tmp_path / "run", **changed)
    assert yaml.safe_load(stored.read_text()) == SETTINGS | changed
    written = stored.stat().st_mtime_ns
    opened(tmp_path / "run", **changed)
    assert stored.stat().st_mtime_ns == written
    with pytest.raises(ConfigError, match="steps was 1"):
        opened(tmp_path / "run", steps=2)


# a disk that says late that it is full


@pytest.mark.parametrize("call", ["write", "fsync", "close"])
def test_rows_are_logged_once_whichever_call_finds_the_disk_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    run = begun(tmp_path / "run")
    run.disk_wait = 5.0
    monkeypatch.setattr(disk, "POLL", 0.01)
    real, log = getattr(os, call), (run.path / "metrics.jsonl").stat().st_ino
    failures = [errno.ENOSPC, errno.EDQUOT]

    def full(handle: int, *rest: Any) -> Any:
        wrong = os.fstat(handle).st_ino == log and failures
        if wrong and call == "write":
            real(handle, rest[0][:5])  # a part of it
        done = None if wrong and call == "write" else real(handle, *rest)
        if wrong:
            raise OSError(failures.pop(), "full")
        return done

    monkeypatch.setattr(os, call, full)
    run.log(2, {"a": 2.0})
    assert not failures
    assert [json.loads(line)["step"] for line in (run.path / "metrics.jsonl").open()] == [1, 2]


def test_a_log_that_cannot_be_cut_back_is_not_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = begun(tmp_path / "run")
    run.disk_wait = 5.0

    def full(*rest: Any) -> None:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "fsync", full)
    monkeypatch.setattr(os, "truncate", full)
    with pytest.raises(DiskError, match="cut back"):
        run.log(2, {"a": 2.0})


# lines that nobody reads

PIPE = """
import os, signal, sys
from apportion.cli.terminal import note
from apportion.system import stderr
from apportion.training.monitoring import warn
from apportion.training.run_folder import RunFolder
from apportion.training.signals import Signals
from pathlib import Path
run = RunFolder(Path("run"), "rl")
with Signals(run.warn) as signals:
    signals.in_training = True
    os.kill(os.getpid(), signal.SIGTERM)
    assert signals.caught == signal.SIGTERM
for say in (run.warn, warn, note, stderr.write):
    say("a line")
sys.stdout.write("whole")
"""


@pytest.mark.parametrize("how", ["2>&1 >&3 | true", "2>&-"])
def test_a_stderr_that_nobody_reads_ends_nothing(how: str) -> None:
    """As with `2>&1 | tee log`, when Ctrl-C ends tee first."""
    script = f'exec 3>&1; {{ sleep 0.2; "{sys.executable}" -c "$1"; echo " $?" >&3; }} 3>&3 {how}'
    if "|" not in how:
        script = f'"{sys.executable}" -c "$1" {how}; echo " $?"'
    done = subprocess.run(["bash", "-c", script, "bash", PIPE], capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["whole", "0"], done


def test_errors_with_a_fix_are_recorded_without_a_traceback(tmp_path: Path) -> None:
    run = opened(tmp_path / "run")
    with pytest.raises(ApportionError), run.record_failure():
        raise ModelError("model: got x")
    assert run.read("status.json")["error"] == "model: got x"
