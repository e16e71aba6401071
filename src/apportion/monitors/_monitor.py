"""Monitors as pure rules over a batch's metrics, relative to the run's own start; state is passed in and returned."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from apportion.types import State

START = 5  # batches whose mean is the run's start
WEIGHT = 1 / 3  # of the newest batch in the running mean: five batches' worth of averaging
CALM = 5  # consecutive batches without an alert that end an episode


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
        metrics: the metrics that it uses; without the first one the monitor is inactive, the others are optional.
        check: {metric: MetricHistory} -> the problem in words and numbers, or None.
        expected: the metrics of a healthy run. causes, fix: likely causes, and the remedy.
        raises_kl_coef: whether a larger KL coefficient counters the problem.
    """

    name: str
    metrics: tuple[str, ...]
    check: Callable[[Mapping[str, MetricHistory]], str | None]
    expected: str
    causes: str
    fix: str
    raises_kl_coef: bool = False


class Alert(NamedTuple):
    """A monitor that fires in this batch: the problem, and whether an episode begins with it."""

    monitor: Monitor
    message: str
    begins: bool


def init(monitors: Iterable[Monitor]) -> State:
    """Return the initial state: float64 tensors (3,).

    "NAME METRIC" holds (batches seen, mean of the first `START` of them, running mean); "NAME episode" holds
    (1 during an episode, quiet batches since it last fired, episodes).
    """
    names = [f"{m.name} {key}" for m in monitors for key in (*m.metrics, "episode")]
    return {name: torch.zeros(3, dtype=torch.float64) for name in names}


def observe(
    monitors: Iterable[Monitor], metrics: Mapping[str, float], state: State
) -> tuple[dict[str, Alert | None], State]:
    """Return ({monitor: its alert, or None}, the state after this batch).

    A monitor whose first metric is absent is not in the result.
    """
    alerts: dict[str, Alert | None] = {}
    state = dict(state)
    for monitor in monitors:
        if monitor.metrics[0] not in metrics:
            continue
        histories = {}
        for key in (key for key in monitor.metrics if key in metrics):
            histories[key], state[f"{monitor.name} {key}"] = follow(state[f"{monitor.name} {key}"], metrics[key])
        message = monitor.check(histories)
        began, state[f"{monitor.name} episode"] = _episode(state[f"{monitor.name} episode"], message is not None)
        alerts[monitor.name] = None if message is None else Alert(monitor, message, began)
    return alerts, state


def follow(stored: Tensor, value: float) -> tuple[MetricHistory, Tensor]:
    """Return (the metric with its new value, its state (3,) float64: batches seen, start, running mean)."""
    seen, start, recent = stored.tolist()
    before = recent if seen else None
    mean = value if before is None else before + WEIGHT * (value - before)
    known = start if seen >= START else None
    if known is None:
        start = (start * seen + value) / (seen + 1)
    return MetricHistory(value, mean, before, known), torch.tensor([seen + 1, start, mean], dtype=torch.float64)


def _episode(stored: Tensor, fires: bool) -> tuple[bool, Tensor]:
    """Return (whether an episode begins, its state); an episode ends after `CALM` batches without an alert."""
    on, quiet, count = stored.tolist()
    begins = fires and not on
    quiet = 0.0 if fires else quiet + 1
    on = 1.0 if fires or (on and quiet < CALM) else 0.0
    return begins, torch.tensor([on, quiet, count + begins], dtype=torch.float64)


def share(value: float, start: float | None) -> str:
    """Return "12% of the run's start (3.28)", or "9.1 times …" from 2 on; `start` must be known."""
    assert start is not None
    ratio = value / start if start else float("inf")
    size = f"{100 * ratio:.3g}% of" if ratio < 2 else f"{ratio:.3g} times"
    return f"{size} the run's start ({start:.3g})"
