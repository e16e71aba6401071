"""The time limit of a call: it stands still with the process, outlives its watcher, nests, and needs signals."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from apportion.config import RLConfig
from apportion.errors import ConfigError
from apportion.stages.method import build_method
from apportion.system import time_limit as module
from apportion.system.time_limit import TimedOut, time_limit

SOURCE = str(Path(module.__file__).parents[2])
BEGIN = f"""
import sys
sys.path.insert(0, {SOURCE!r})
import collections, itertools, os, signal, time
from apportion.system import time_limit as module
from apportion.system.time_limit import TimedOut, time_limit
"""


def start(code: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-I", "-c", BEGIN + code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="only /proc says that a process is stopped")
def test_time_stands_still_while_the_process_is_stopped() -> None:
    child = start(
        "with time_limit(1.5, 'late'):\n"
        "    print('ready', flush=True)\n    line = sys.stdin.readline()\nprint('got', line, flush=True)\n"
    )
    assert child.stdin is not None and child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    os.kill(child.pid, signal.SIGSTOP)
    time.sleep(3.6)  # beyond the time and the grace
    os.kill(child.pid, signal.SIGCONT)
    out, _ = child.communicate("an answer\n", timeout=60)
    assert child.returncode == 0 and out.startswith("got an answer")


def test_a_block_is_interrupted_and_the_next_one_has_its_own_time() -> None:
    for _ in range(2):
        with pytest.raises(TimedOut), time_limit(0.2, "late"):
            time.sleep(30)
    with time_limit(30.0, "late"):
        time.sleep(0.5)
    with time_limit(None, "late"):
        pass


def test_a_function_may_have_its_own_time_limit() -> None:
    """With SIGALRM, as reward functions do: both work in one call."""

    def alarm(number: int, frame: object) -> None:
        raise TimeoutError("mine")

    def work(seconds: float) -> None:
        signal.setitimer(signal.ITIMER_REAL, seconds)
        time.sleep(20)

    before = signal.signal(signal.SIGALRM, alarm)
    try:
        with pytest.raises(TimeoutError, match="mine"), time_limit(30.0, "late"):
            work(0.2)
        with pytest.raises(TimedOut), time_limit(0.2, "late"):
            work(30.0)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_a_hang_in_c_ends_the_process_and_leaves_its_files(tmp_path: Path) -> None:
    child = start(
        f"with time_limit(0.3, 'the message', {{{str(tmp_path / 'rows')!r}: 'the rollouts'}}, "
        f"{str(tmp_path / 'trace')!r}):\n    collections.deque(itertools.repeat(0), maxlen=0)\n"
    )
    _, err = child.communicate(timeout=60)
    assert child.returncode == -signal.SIGKILL and err == "apportion: the message\n"
    assert (tmp_path / "rows").read_text() == "the rollouts"
    assert "in <module>" in (tmp_path / "trace").read_text()


def test_a_result_counts_when_the_watcher_died(monkeypatch: pytest.MonkeyPatch) -> None:
    started = []
    real = subprocess.Popen
    monkeypatch.setattr(module.subprocess, "Popen", lambda *a, **k: started.append(real(*a, **k)) or started[-1])
    with time_limit(30.0, "late"):
        started[0].kill()
        started[0].wait()
    assert len(started) == 1


def test_a_system_without_signals(monkeypatch: pytest.MonkeyPatch) -> None:
    child = start(
        "import importlib\n"
        "for name in ('SIGRTMIN', 'SIGUSR1', 'SIGUSR2'):\n    delattr(signal, name)\n"
        "module = importlib.reload(module)\nprint(module.SIGNAL, module.TRACE)\n"
    )
    assert child.communicate(timeout=60)[0] == "None None\n" and child.returncode == 0
    monkeypatch.setattr(module, "SIGNAL", None)
    config = RLConfig(reward_model="x")
    build_method(config)
    config.credit = [{"process": {"function": "os:getcwd"}}]
    with pytest.raises(ConfigError, match=r"monitors\.timeout: got 600\.0; expected null: .* interrupt os:getcwd"):
        build_method(config)
    config.monitors.timeout = None
    build_method(config)
    with pytest.raises(OSError, match="no signal"), time_limit(1.0, "late"):
        pass
