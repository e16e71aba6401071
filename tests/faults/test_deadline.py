"""The time of a user's function: it stands still with the process, outlives its watchdog, and needs signals."""

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
from apportion.stages.rl.method import build_method
from apportion.system import time_limit
from apportion.system.time_limit import Deadline, TimedOut

# the package without what its __init__ imports, which takes seconds
BARE = f"""
import sys, types
package = types.ModuleType("apportion")
package.__path__ = [{str(Path(time_limit.__file__).parent)!r}]
sys.modules["apportion"] = package
"""


def start(code: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-I", "-c", BARE + code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="only /proc says that a process is stopped")
def test_time_stands_still_while_the_process_is_stopped() -> None:
    child = start(
        "from apportion.system.time_limit import Deadline\n"
        "def work():\n    print('ready', flush=True)\n    return sys.stdin.readline()\n"
        "print('got', Deadline(1.5).call(work, error='late'), flush=True)\n"
    )
    assert child.stdin is not None and child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    os.kill(child.pid, signal.SIGSTOP)
    time.sleep(3.6)  # beyond the time and the grace
    os.kill(child.pid, signal.SIGCONT)
    out, _ = child.communicate("an answer\n", timeout=60)
    assert child.returncode == 0 and out.startswith("got an answer")


def test_what_a_function_gave_counts_when_its_watchdog_died() -> None:
    limit = Deadline(30.0)

    def work(wait: bool) -> str:
        assert limit._process is not None
        limit._process.kill()
        if wait:
            limit._process.wait()
        return "done"

    assert [limit.call(work, wait, error="late") for wait in (True, False, True)] == ["done"] * 3
    limit.seconds = 0.2
    with pytest.raises(TimedOut):
        limit.call(time.sleep, 30, error="late")
    limit.close()


def test_a_watchdog_that_is_started_again_leaves_the_same_files(tmp_path: Path) -> None:
    child = start(
        "import collections, itertools\n"
        "from apportion.system.time_limit import Deadline\n"
        f"limit = Deadline(0.3)\nlimit.leave({{{str(tmp_path / 'rows')!r}: 'the rollouts'}})\n"
        "limit._process.kill(); limit._process.wait()\n"
        "limit.call(lambda: collections.deque(itertools.repeat(0), maxlen=0), error='late')\n"
    )
    child.communicate(timeout=60)
    assert child.returncode == -signal.SIGKILL
    assert (tmp_path / "rows").read_text() == "the rollouts"


def test_a_system_without_signals() -> None:
    child = start(
        "import signal\n"
        "for name in ('SIGRTMIN', 'SIGUSR1', 'SIGUSR2'):\n    delattr(signal, name)\n"
        "from apportion.system.time_limit import SIGNAL, TRACE, Deadline\n"
        "print(SIGNAL, TRACE, Deadline(None).call(len, 'four', error=''))\n"
    )
    assert child.communicate(timeout=60)[0] == "None None 4\n" and child.returncode == 0


def test_without_signals_only_functions_of_the_users_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time_limit, "SIGNAL", None)
    config = RLConfig(reward_model="x")
    build_method(config)
    config.credit = [{"process": {"function": "os:getcwd"}}]
    with pytest.raises(ConfigError, match=r"monitors\.timeout: got 600\.0; expected null: .* interrupt os:getcwd"):
        build_method(config)
    config.monitors.timeout = None
    build_method(config)
    with pytest.raises(OSError, match="no signal"):
        Deadline(1.0).call(len, "", error="late")
