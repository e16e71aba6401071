"""A line about the work in progress, where a command would say nothing for half a minute.

A file of output (`make demo > log`) then shows that a long stage is alive, how far it is, and the time left. A terminal
shows a bar instead.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from apportion.system import progress, stderr

SILENCE = 25.0  # seconds without a line; a line comes within 30, as a thread may have to wait for Python's lock


class Heartbeat:
    """A thread that writes a line where nothing was written for `silence` seconds and something is being done."""

    def __init__(self, silence: float = SILENCE, write: Callable[[str], None] = stderr.write) -> None:
        self._silence, self._write = silence, write
        self._last = time.monotonic()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def touch(self) -> None:
        """Restart the silence: something was written."""
        self._last = time.monotonic()

    def __enter__(self) -> Heartbeat:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._ended.wait(max(0.01, self._last + self._silence - time.monotonic())):
            if time.monotonic() < self._last + self._silence:
                continue
            line = progress.describe(progress.current())
            if line:
                self._write(f"{line}\n")
            self.touch()


_running: list[Heartbeat] = []


@contextmanager
def heartbeat(wanted: bool = True) -> Iterator[None]:
    """Run a heartbeat within the block, if `wanted`, where stderr is no terminal."""
    if not wanted or _running or _is_terminal():
        yield
        return
    with Heartbeat() as beat:
        _running.append(beat)
        try:
            yield
        finally:
            _running.remove(beat)


def touch() -> None:
    """Tell the heartbeat, if one runs, that something was written."""
    for beat in _running:
        beat.touch()


def _is_terminal() -> bool:
    try:
        return sys.stderr.isatty()
    except (AttributeError, ValueError):  # none, or closed
        return False
