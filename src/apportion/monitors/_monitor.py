"""What a monitor is: a rule over a batch's metrics, judged against the run's own start. Pure: state goes in and out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from apportion.types import State

START = 5  # batches whose mean is the run's start
WEIGHT = 1 / 3  # of the newest batch in the running mean: five batches' worth of averaging
CALM = 5  # quiet batches in a row that end an episode


class MetricHistory(NamedTuple):
    """One metric so far: this batch's value, the running mean with it and before it, and the mean of the run's start.

    `before` is None in the first batch, `start` until the first `START` batches are over.
    """

    value: float
    recent: float
    before: float | None = None
    start: float | None = None

    def risen(self, least: float, times: float) -> bool:
        """Return whether the running mean is above both `least` and `times` the start; False while there is none."""
        return self.start is not None and self.recent > max(least, times * self.start)


class Monitor(NamedTuple):
    """One monitor.

    Attributes:
        name: its setting (`monitors.NAME`) and metric (`monitors/NAME`).
        reads: metrics, the first of which must be there for it to judge; those that a run does not log are left out.
        judge: {metric: Track} -> what is wrong, in words and numbers, or None.
        expected: what a healthy run shows. causes, fix: what it is likely to be, and what to do about it.
        tightens: whether a larger KL coefficient holds what it monitors.
    """

    name: str
    reads: tuple[str, ...]
    judge: Callable[[Mapping[str, MetricHistory]], str | None]
    expected: str
    causes: str
    fix: str
    tightens: bool = False


class Alert(NamedTuple):
    """A monitor that fires in this batch: what it says, and whether an episode begins with it."""

    monitor: Monitor
    said: str
    begins: bool


def init(monitors: Iterable[Monitor]) -> State:
    """Return the state of a run that has seen nothing: float64 tensors (3,).

    "NAME METRIC" holds (batches seen, mean of the first `START` of them, running mean); "NAME episode" holds
    (1 during an episode, quiet batches since it last fired, episodes).
    """
    names = [f"{w.name} {key}" for w in monitors for key in (*w.reads, "episode")]
    return {name: torch.zeros(3, dtype=torch.float64) for name in names}


def observe(
    monitors: Iterable[Monitor], metrics: Mapping[str, float], state: State
) -> tuple[dict[str, Alert | None], State]:
    """Return ({monitor: what it found, or None}, the state after this batch).

    A monitor whose first metric is absent says nothing at all and is not in the answer.
    """
    found: dict[str, Alert | None] = {}
    state = dict(state)
    for monitor in monitors:
        if monitor.reads[0] not in metrics:
            continue
        tracks = {}
        for key in (key for key in monitor.reads if key in metrics):
            tracks[key], state[f"{monitor.name} {key}"] = follow(state[f"{monitor.name} {key}"], metrics[key])
        said = monitor.judge(tracks)
        began, state[f"{monitor.name} episode"] = _episode(state[f"{monitor.name} episode"], said is not None)
        found[monitor.name] = None if said is None else Alert(monitor, said, began)
    return found, state


def follow(stored: Tensor, value: float) -> tuple[MetricHistory, Tensor]:
    """Return (the metric with its new value, what to store of it): (seen, start, running mean), (3,) float64."""
    seen, start, recent = stored.tolist()
    before = recent if seen else None
    mean = value if before is None else before + WEIGHT * (value - before)
    known = start if seen >= START else None
    if known is None:
        start = (start * seen + value) / (seen + 1)
    return MetricHistory(value, mean, before, known), torch.tensor([seen + 1, start, mean], dtype=torch.float64)


def _episode(stored: Tensor, fires: bool) -> tuple[bool, Tensor]:
    """Return (whether an episode begins, what to store): it ends after `CALM` batches in which nothing fired."""
    on, quiet, count = stored.tolist()
    begins = fires and not on
    quiet = 0.0 if fires else quiet + 1
    on = 1.0 if fires or (on and quiet < CALM) else 0.0
    return begins, torch.tensor([on, quiet, count + begins], dtype=torch.float64)


def share(part: float, whole: float | None) -> str:
    """Return "12% of the run's start (3.28)", or "9.1 times …" from twice on; `whole` is a start that is known."""
    assert whole is not None
    ratio = part / whole if whole else float("inf")
    size = f"{100 * ratio:.3g}% of" if ratio < 2 else f"{ratio:.3g} times"
    return f"{size} the run's start ({whole:.3g})"
