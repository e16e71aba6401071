"""The paired bootstrap over prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from apportion.intervals import Interval

TAILS = (0.025, 0.975)


def draws(count: int, resamples: int, seed: int) -> np.ndarray:
    """Return (resamples, count) int64: in each row `count` prompts drawn with replacement."""
    return np.random.default_rng(seed).integers(0, count, size=(resamples, count))


def percentiles(mean: float, values: Sequence[float] | np.ndarray) -> Interval:
    """Return {mean, low, high}: the 2.5th and 97.5th percentile of a statistic over resamples (Efron 1979)."""
    low, high = np.quantile(np.asarray(values, dtype=np.float64), TAILS)
    return {"mean": mean, "low": float(low), "high": float(high)}


def difference(first: np.ndarray, second: np.ndarray, resamples: int, seed: int) -> Interval:
    """Return {mean, low, high} of the mean of first − second, both (N,) by prompt: a paired percentile bootstrap.

    Prompts are resampled, and both values of a prompt stay together, so that what makes a prompt hard for both does not
    widen the interval.
    """
    gaps = first - second
    return percentiles(float(gaps.mean()), gaps[draws(len(gaps), resamples, seed)].mean(axis=1))


def over_prompts(
    statistic: Callable[[np.ndarray], float | None], count: int, resamples: int, seed: int
) -> Interval | None:
    """Return {mean, low, high} of `statistic`, a function of the numbers (N,) of some prompts; None where it has none.

    Resamples in which it has no value are left out.
    """
    mean = statistic(np.arange(count))
    if mean is None:
        return None
    found = (statistic(rows) for rows in draws(count, resamples, seed))
    return percentiles(mean, [value for value in found if value is not None] or [mean])
