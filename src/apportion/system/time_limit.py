"""Time limit of a call: a signal that raises TimedOut in it, and an end to the process where Python does not return.

A process outside keeps the time (this file run as a program, with the standard library only), because nothing inside
can. A thread needs Python's lock, which a C extension may hold. `signal.setitimer` has one timer a process, with
SIGALRM, and functions use that for limits of their own. `faulthandler.dump_traceback_later(exit=True)` does end such a
process, but without a message and without status.json: that would have to say "failed" during every call in advance.
"""

from __future__ import annotations

import faulthandler
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

GRACE = 5.0  # seconds from the first signal to the end of the process
TICK = 0.2  # seconds between looks at whether the process is stopped
TRACE_TIME = 0.2  # seconds that faulthandler has


def _real_time_signal(offset: int, otherwise: str) -> int | None:
    """Return a real-time signal, which has no other meaning (job schedulers use SIGUSR1 and SIGUSR2), or the signal
    called `otherwise`; None where there is neither (Windows)."""
    first, plain = getattr(signal, "SIGRTMIN", None), getattr(signal, otherwise, None)
    return int(first) + offset if first is not None else None if plain is None else int(plain)


SIGNAL = _real_time_signal(7, "SIGUSR2")  # raises TimedOut
TRACE = _real_time_signal(8, "SIGUSR1")  # makes faulthandler write where Python is


class TimedOut(BaseException):
    """The time is over. Not an Exception: a function that retries on every Exception would never end."""


@contextmanager
def time_limit(
    seconds: float | None, message: str, files: Mapping[str, str] | None = None, trace: str | None = None
) -> Iterator[None]:
    """Run a block of at most `seconds`; None sets no limit. Time stands still while the process is stopped.

    Where the block hangs in code that no signal interrupts, or runs in another thread than the main one, the process is
    killed, with these files saved:

    Args:
        message: written to stderr. files: {path: text}, written then.
        trace: path of a file for the traceback.

    Raises:
        TimedOut: the time is over. OSError: there is no signal, or no process can be started.
    """
    if seconds is None:
        yield
        return
    if SIGNAL is None or TRACE is None:
        raise OSError("this system has no signal that could end a call")
    interruptible = threading.current_thread() is threading.main_thread()
    if interruptible:
        signal.signal(SIGNAL, _expired)
    with tempfile.TemporaryFile() as traceback:
        faulthandler.register(TRACE, file=traceback, all_threads=False)
        request: dict[str, Any] = {"seconds": seconds, "grace": min(GRACE, max(seconds, 0.5)) if interruptible else 0.0}
        request |= {"parent": os.getpid(), "message": message, "files": dict(files or {}), "trace": trace}
        watcher = subprocess.Popen(
            [sys.executable, "-I", "-S", __file__, str(traceback.fileno())],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is for the run
            pass_fds=[traceback.fileno()],
        )
        assert watcher.stdin is not None
        try:
            with suppress(BrokenPipeError):
                watcher.stdin.write(json.dumps(request).encode() + b"\n")
                watcher.stdin.flush()
            _active.append(True)
            try:
                yield
            finally:
                try:
                    _active.clear()
                except TimedOut:  # pragma: no cover (the signal came between the end of the block and this)
                    _active.clear()
        finally:
            watcher.kill()  # closing its input is not enough: a child of the block may hold it open
            with suppress(BrokenPipeError):
                watcher.stdin.close()
            watcher.wait()
            faulthandler.unregister(TRACE)


_active: list[bool] = []  # whether a block runs: a signal that comes late must do nothing


def _expired(number: int, frame: Any) -> None:
    if _active:
        raise TimedOut


# the watching process


def watch(traceback: int) -> None:  # pragma: no cover (not measured: the process is killed at its end)
    """Serve one block: read the request, wait, send the signal once a second for the grace, then end the parent."""
    line = sys.stdin.buffer.readline()
    if not line:  # the block ended at once
        return
    request = json.loads(line)
    parent, grace = request["parent"], request["grace"]
    if _ends_within(request["seconds"], parent):
        return
    while grace > 0:
        os.kill(parent, int(SIGNAL or 0))
        if _ends_within(min(1.0, grace), parent):
            return
        grace -= 1.0
    files = dict(request["files"])
    if request["trace"]:
        os.kill(parent, int(TRACE or 0))
        time.sleep(TRACE_TIME)
        files[request["trace"]] = os.pread(traceback, 1 << 20, 0).decode(errors="replace")
    for path, text in files.items():
        with suppress(OSError):  # a full disk must not keep a hung run alive
            os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
            with open(f"{path}.tmp", "w", encoding="utf-8", errors="replace") as file:
                file.write(text)
            os.replace(f"{path}.tmp", path)
    with suppress(OSError):
        sys.stderr.write(f"apportion: {request['message']}\n")
        sys.stderr.flush()
    os.kill(parent, signal.SIGKILL)


def _ends_within(seconds: float, parent: int) -> bool:  # pragma: no cover (in the watching process)
    """Wait for `seconds` in which `parent` is not stopped; return at once with True where its block or it ended."""
    while seconds > 0:
        tick = min(TICK, seconds)
        if select.select([0], [], [], tick)[0] or os.getppid() != parent:
            return True
        seconds -= 0 if _is_stopped(parent) else tick
    return False


def _is_stopped(process: int) -> bool:  # pragma: no cover (in the watching process)
    """Whether the process is stopped or traced, where /proc says so."""
    with suppress(OSError), open(f"/proc/{process}/stat", "rb") as file:
        return file.read().rpartition(b")")[2].split()[:1] in ([b"T"], [b"t"])  # after the name, which may hold any
    return False


if __name__ == "__main__":  # pragma: no cover (in the watching process)
    watch(int(sys.argv[1]))
