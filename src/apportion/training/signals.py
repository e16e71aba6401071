"""SIGINT and SIGTERM during training: the first one finishes the step and checkpoints, a second stops immediately."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

from apportion.system import stderr

WATCHED = (signal.SIGINT, signal.SIGTERM)
CURSOR = "\x1b[?25h"  # shows it
ECHO = 1.0  # seconds in which a further signal is the same request: a terminal and a launcher both send it


class Signals:
    """Catches the first signal inside its block; outside, and in threads other than the main one, nothing changes.

    Attributes:
        caught: the signal's number, 0 before one came.
        in_training: whether steps are running, so that one can be finished; else a signal has its previous effect.
    """

    def __init__(self, warn: Callable[[str], None]) -> None:
        self.caught, self._warn, self._when = 0, warn, 0.0
        self.in_training = False
        self._process = os.getpid()
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            for number in WATCHED:
                before = signal.getsignal(number)
                # an ignored one (a background job) stays ignored; None: a library's own handler, in C
                if before not in (None, signal.SIG_IGN):
                    self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def __bool__(self) -> bool:
        return self.caught != 0

    def _handle(self, number: int, frame: FrameType | None) -> None:
        forked = os.getpid() != self._process  # by a reward function, for a pool of workers, which it ends by a signal
        if forked or (not self.in_training and not self.caught):
            signal.signal(number, self._before[number])
            os.kill(os.getpid(), number)
        elif not self.caught:
            self.caught, self._when = number, time.monotonic()
            stderr.write_to_terminal(CURSOR)  # a progress bar hides it, and a second signal may be final
            self._warn(
                f"apportion: {signal.Signals(number).name}: finishing this batch and writing a checkpoint; "
                "a second one stops immediately.\n"
            )
        elif time.monotonic() - self._when > ECHO:
            self._warn("apportion: stopped; the same command resumes from the last checkpoint, if there is one.\n")
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
