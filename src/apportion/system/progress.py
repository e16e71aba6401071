"""Progress of long work: what is being done, how far it is, and the seconds left.

The code that works says what it does (`activity`); a command that is watched shows it (`current`, `describe`). Nested
activities are named from the outermost, "2/3 PPO: training, step 12 of 40".
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")


class Activity:
    """A piece of work.

    Attributes:
        label: what is being done. unit: what is counted, such as "step".
        total: how many there are; None where that is not known.
        start, done: how many were done when it began, and are done now.
        named: whether its label comes before those of the activities within it.
    """

    named = True

    def __init__(
        self,
        label: str,
        total: int | None = None,
        unit: str = "",
        start: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.label, self.total, self.unit = label, total, unit
        self.start = self.done = start
        self._clock = clock
        self._began = clock()

    def advance(self, count: int = 1) -> None:
        """Count `count` more as done."""
        self.done += count

    @property
    def seconds(self) -> float:
        """Seconds since it began."""
        return self._clock() - self._began

    @property
    def seconds_left(self) -> float | None:
        """Seconds that the rest takes at the pace so far; None while nothing tells."""
        done = self.done - self.start
        if self.total is None or done <= 0:
            return None
        return self.seconds / done * max(0, self.total - self.done)

    def ended(self, labels: tuple[str, ...], seconds: float) -> None:
        """Take note that an activity within this one, named by `labels` from the outermost, took `seconds`."""


A = TypeVar("A", bound=Activity)
_activities: list[Activity] = []  # from the outermost


@contextmanager
def activity(label: str, total: int | None = None, *, unit: str = "", start: int = 0) -> Iterator[Activity]:
    """Make `label` what is being done within the block; the block counts with `advance`."""
    with running(Activity(label, total, unit, start)) as entry:
        yield entry


@contextmanager
def running(entry: A) -> Iterator[A]:
    """Make `entry` what is being done within the block, and report its end to the activities around it."""
    outer: tuple[Activity, ...] = tuple(_activities)
    _activities.append(entry)
    try:
        yield entry
    finally:
        _activities.remove(entry)  # a generator may be closed after an outer block
        labels = (*(one.label for one in outer), entry.label)
        for depth, one in enumerate(outer, 1):
            one.ended(labels[depth:], entry.seconds)


def counted(items: Iterable[T], label: str, total: int, *, unit: str = "") -> Iterator[T]:
    """Yield `items` as an activity of `total` of them."""
    with activity(label, total, unit=unit) as entry:
        for item in items:
            yield item
            entry.advance()


def current() -> tuple[Activity, ...]:
    """Return what is being done, from the outermost activity; safe to call from another thread."""
    return tuple(_activities)


def describe(activities: tuple[Activity, ...]) -> str:
    """Return one line: labels, count, time so far, the time left of the innermost activity that tells it, and of all.

    An activity that is not `named` gives no label to those within it, only its time left, behind theirs.
    """
    if not activities:
        return ""
    last = activities[-1]
    words = ": ".join(entry.label for entry in activities if entry.named or entry is last)
    if last.total is not None:
        words += f", {last.unit} {last.done} of {last.total}" if last.unit else f", {last.done} of {last.total}"
    words += f", {duration(last.seconds)} so far"
    named = (entry for entry in reversed(activities) if entry.named or entry is last)
    left = next((entry.seconds_left for entry in named if entry.seconds_left is not None), None)
    if left is not None:
        words += f", about {duration(left)} left"
    return words + (left_of_all(activities) if last is not activities[0] else "")


def left_of_all(activities: tuple[Activity, ...]) -> str:
    """Return "; demo: about 9 min 05 s left" where the outermost activity is one that is not `named`, else ""."""
    first = activities[0] if activities else None
    if first is None or first.named or (left := first.seconds_left) is None:
        return ""
    return f"; {first.label}: about {duration(left)} left"


def duration(seconds: float) -> str:
    """Return a time as "8 s", "3 min 05 s" or "2 h 10 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min"
