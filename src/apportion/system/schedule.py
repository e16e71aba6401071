"""Schedule: long work whose parts are planned in seconds, with the time left of all of it and what each part took."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from apportion.system import progress
from apportion.system.progress import Activity


class Part(NamedTuple):
    """A part of planned work.

    Attributes:
        stage: the label of the activity that it belongs to.
        within: the label of the activity inside that one; "" for all of the stage that no other part names.
        seconds: that it should take.
    """

    stage: str
    within: str
    seconds: float


class Schedule(Activity):
    """The outermost activity of planned work.

    Attributes:
        parts: in the order in which they are done. taken: seconds that each took, None while it has not ended.
    """

    named = False

    def __init__(self, label: str, parts: Sequence[Part], clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(label, clock=clock)
        self.parts = tuple(parts)
        self.taken: list[float | None] = [None] * len(self.parts)

    def ended(self, labels: tuple[str, ...], seconds: float) -> None:
        """Record what a part took; the end of a stage gives its nameless part what the others left."""
        stage, *within = labels
        for number, part in enumerate(self.parts):
            if part.stage != stage or len(labels) > 2 or part.within != "".join(within):
                continue
            others = 0.0 if within else sum(self.taken[i] or 0.0 for i in self._of(stage) if i != number)
            self.taken[number] = (self.taken[number] or 0.0) + seconds - others

    @property
    def seconds_left(self) -> float:
        """Seconds that are left: of the current part by its own pace, or as planned, and of those after it as planned.

        What is planned is taken times the ratio of taken to planned seconds of the parts that have ended: the machine
        may be faster or slower than it was measured.
        """
        activities = progress.current()
        below = activities[activities.index(self) + 1 :] if self in activities else ()
        now = self._current(below)
        ended = [(self.parts[i].seconds, taken) for i in range(now) if (taken := self.taken[i]) is not None]
        planned = sum(seconds for seconds, _ in ended)
        ratio = sum(taken for _, taken in ended) / planned if planned > 0 else 1.0
        left = ratio * sum(part.seconds for part in self.parts[now + 1 :])
        return left + self._left_of(now, below, ratio) if now < len(self.parts) else left

    def _left_of(self, number: int, below: Sequence[Activity], ratio: float) -> float:
        """Return the seconds left of part `number`, which is being done."""
        part = self.parts[number]
        own = below[1].seconds_left if part.within and len(below) > 1 else None
        if own is not None:
            return own
        spent = below[0].seconds - sum(self.taken[i] or 0.0 for i in self._of(part.stage)) if below else 0.0
        return max(0.0, ratio * part.seconds - spent)

    def _of(self, stage: str) -> list[int]:
        return [number for number, part in enumerate(self.parts) if part.stage == stage]

    def _current(self, below: Sequence[Activity]) -> int:
        """Return the number of the part that is being done, of which the activities `below` tell."""
        ended = max((number + 1 for number, taken in enumerate(self.taken) if taken is not None), default=0)
        if not below:
            return ended
        of_stage = self._of(below[0].label)
        named = [number for number in of_stage if len(below) > 1 and self.parts[number].within == below[1].label]
        if named:
            return named[0]
        return next((number for number in of_stage if number >= ended), ended)
