"""Calling a function that may never return: an error when its time is over, and an end to the process if need be.

Neither a thread nor a timer would do. A function in a worker thread cannot be ended, and one that hangs while it holds
Python's lock (a regular expression, a C extension) stops the thread that waits for it as well. A timer's handler in the
main thread runs between two of Python's steps alone, and SIGALRM is what reward functions use for time limits of their
own. So a process outside keeps the time (`watchdog.py`): it first sends a signal whose handler raises `TimedOut` in the
function, which ends loops, sleeps, sockets and regular expressions; if Python does not come to, it kills the process.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any, TypeVar

from apportion.system import watchdog

T = TypeVar("T")


def _signal(above: int, else_: str) -> int | None:
    """Return the number of a real-time signal, which has no other meaning; SIGUSR1 and SIGUSR2 have one for job
    schedulers. None where there is neither (Windows)."""
    first = getattr(signal, "SIGRTMIN", None)
    plain = getattr(signal, else_, None)
    return int(first) + above if first is not None else None if plain is None else int(plain)


SIGNAL = _signal(7, "SIGUSR2")  # raises TimedOut
TRACE = _signal(8, "SIGUSR1")  # asks faulthandler where Python is
GRACE = 5.0  # seconds from the signal to the end of the process


class TimedOut(BaseException):
    """The time is over. Not an Exception: a function that retries on every Exception would go on."""


class Deadline:
    """Calls functions within `seconds` each; one watchdog process serves all calls.

    Args:
        seconds: for a call; None for no limit and no watchdog.
    """

    def __init__(self, seconds: float | None) -> None:
        self.seconds = seconds
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0
        self._answers: IO[bytes] | None = None
        self._left: dict[str, str] = {}

    def call(
        self,
        function: Callable[..., T],
        *args: Any,
        error: str,
        files: Mapping[str, str] | None = None,
        trace: str | None = None,
    ) -> T:
        """Return `function(*args)`.

        Args:
            error: what the watchdog writes to stderr where it has to kill the process.
            files: {path: text} that it then writes as well, beside those of `leave`.
            trace: path that it then writes to where Python was (on Linux).

        Raises:
            TimedOut: after `seconds`, wherever Python comes to (in the main thread; from another one the process is
                ended at once).
            OSError: the watchdog cannot be started, or there is no signal for it to send.
        """
        if self.seconds is None:
            return function(*args)
        if SIGNAL is None:
            raise OSError("this system has no signal that could end a call")
        polite = threading.current_thread() is threading.main_thread()
        if polite and signal.getsignal(SIGNAL) != _expired:
            signal.signal(SIGNAL, _expired)
        grace = min(GRACE, max(self.seconds, 0.5)) if polite else 0.0
        said = {"arm": self.seconds, "grace": grace, "polite": polite, "error": error, "last": files or {}}
        self._tell(said | {"trace": {} if trace is None else self._faulthandler(trace)})
        _RUNNING.append(self)
        try:
            return function(*args)
        finally:
            try:
                _RUNNING.clear()
            except TimedOut:  # the signal came between the function's end and this
                _RUNNING.clear()
            self._disarm()

    def _faulthandler(self, to: str) -> dict[str, Any]:
        """Have faulthandler answer a signal, and return what the watchdog needs to know of it."""
        if self._answers is None or self._owner != os.getpid():
            self._answers = tempfile.TemporaryFile()  # noqa: SIM115 (faulthandler keeps it)
            assert TRACE is not None
            faulthandler.register(TRACE, file=self._answers, all_threads=False)
        return {"signal": TRACE, "from": f"/proc/{os.getpid()}/fd/{self._answers.fileno()}", "to": to}

    def leave(self, files: Mapping[str, str]) -> None:
        """Have `files` ({path: text}) written if the process has to be killed; they replace those said before."""
        if self.seconds is not None and SIGNAL is not None:
            self._left = dict(files)
            self._tell({"files": self._left})

    def close(self) -> None:
        """End the watchdog."""
        if self._owner == os.getpid():
            self._forget()
        self._process = None
        if self._answers is not None and TRACE is not None:
            faulthandler.unregister(TRACE)
            self._answers.close()
            self._answers = None

    def __del__(self) -> None:
        self.close()

    def _tell(self, said: Mapping[str, Any]) -> None:
        """Tell the watchdog, which is started where there is none and once more where it has died."""
        if self._process is None or self._owner != os.getpid():  # a fork of this process has no watchdog yet
            self._start()
        try:
            self._write(said)
        except BrokenPipeError:
            self._forget()
            self._start()
            if self._left and "files" not in said:
                self._write({"files": self._left})
            self._write(said)

    def _disarm(self) -> None:
        """Tell the watchdog that a call is over; one that has died need not know, and what the call gave counts."""
        if self._process is not None and self._owner == os.getpid():
            try:
                self._write({"disarm": True})
            except BrokenPipeError:
                self._forget()

    def _start(self) -> None:
        self._owner = os.getpid()
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", str(Path(watchdog.__file__)), str(os.getpid()), str(SIGNAL)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is for the run
        )

    def _forget(self) -> None:
        """Let go of a watchdog, dead or alive."""
        dead, self._process = self._process, None
        if dead is not None and dead.stdin is not None:
            dead.kill()  # it need not read the end of its input first: a child may hold the other side open
            with contextlib.suppress(BrokenPipeError):
                dead.stdin.close()
            dead.wait()

    def _write(self, said: Mapping[str, Any]) -> None:
        assert self._process is not None and self._process.stdin is not None
        self._process.stdin.write(json.dumps(said).encode() + b"\n")
        self._process.stdin.flush()


_RUNNING: list[Deadline] = []  # calls in progress: a signal that comes late must do nothing


def _expired(number: int, frame: Any) -> None:
    if _RUNNING:
        raise TimedOut
