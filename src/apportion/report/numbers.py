"""Numbers as the report prints them, and the mean with its interval."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

MINUS = "\u2212"


class Interval(NamedTuple):
    """A mean with its 95% interval; low and high are None where none was given."""

    mean: float
    low: float | None = None
    high: float | None = None


def finite(value: object) -> float | None:
    """Return `value` as a float, or None where it is not a finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        value = float(value)
    except OverflowError:
        return None
    return value if math.isfinite(value) else None


def interval(value: object) -> Interval | None:
    """Return {"mean","low","high"} or a bare number as an Interval; None where there is no finite mean."""
    if isinstance(value, Mapping):
        mean = finite(value.get("mean"))
        return None if mean is None else Interval(mean, finite(value.get("low")), finite(value.get("high")))
    mean = finite(value)
    return None if mean is None else Interval(mean)


def number(value: float | None, signed: bool = False, beside: float = 0.0) -> str:
    """Return about three significant digits with a true minus sign; an en dash for None.

    `beside` is the largest size among the numbers shown with it, whose decimals it takes.
    """
    if value is None:
        return "\u2013"
    size = max(abs(value), abs(beside))
    if size != 0 and (size >= 1e6 or size < 1e-3):
        text = f"{value:.1e}"
    else:
        digits = 0 if size >= 1000 else 1 if size >= 100 else 2 if size >= 1 else 3
        text = f"{value:.{digits}f}"
    if not text.strip("-0."):
        text = text.removeprefix("-")  # no minus before a zero
    sign = "+" if signed and value > 0 else ""
    return sign + text.replace("-", MINUS)


def span(value: Interval, beside: float = 0.0) -> str:
    """Return the interval as "[low, high]", empty where there is none."""
    if value.low is None or value.high is None:
        return ""
    return f"[{number(value.low, beside=beside)}, {number(value.high, beside=beside)}]"


def rounded(values: object, digits: int = 5) -> list[float | None]:
    """Return a list of numbers to `digits` significant digits, None where one is not a finite number."""
    if not isinstance(values, list | tuple):
        return []
    clean = (finite(v) for v in values)
    return [None if v is None else float(f"{v:.{digits}g}") for v in clean]
