"""Numbers and colours of the report: formatting, intervals, run colours, and the scale of token heat maps."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

MINUS = "\u2212"


class Interval(NamedTuple):
    """A mean with its 95% interval; low and high may be None."""

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

    `beside` is the largest absolute value among the numbers shown with it; it sets the number of decimals.
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


class RunColour(NamedTuple):
    """A run's colour on a light and on a dark page."""

    light: str
    dark: str


# The palette of Okabe and Ito, which is safe for colour-blind readers; shades adjusted for each background.
RUN_COLOURS = (
    RunColour("#0072b2", "#56b4e9"),
    RunColour("#d55e00", "#f0894a"),
    RunColour("#00805d", "#2fc79a"),
    RunColour("#b2568c", "#e39ac2"),
    RunColour("#a67700", "#e6b422"),
    RunColour("#5b5fc7", "#a3a6f5"),
)

POSITIVE = (242, 142, 43)
NEGATIVE = (90, 155, 224)
FAINT = 0.03
EVEN_SHARES = 4

_SPECIAL = re.compile(r"<\|[^<>]*\|>|</?(s|pad|unk|bos|eos|mask|start_of_turn|end_of_turn)>|\[(PAD|SEP|CLS|UNK|MASK)\]")
_CONTROLS = {i: 0x2400 + i for i in range(32) if chr(i) not in "\t\n"} | {127: 0x2421}


def run_colour(index: int) -> RunColour:
    """Return the colour of run number `index`; they repeat after six."""
    return RUN_COLOURS[index % len(RUN_COLOURS)]


def shown(token: str) -> str:
    """Return a token as it is displayed: a newline as ↵ and a break, a tab as ⇥, control characters as symbols."""
    text = token.replace("\r\n", "\n").translate(_CONTROLS)
    return text.replace("\n", "\u21b5\n").replace("\t", "\u21e5\t") or "\u2205"


def is_special(token: str) -> bool:
    """Return whether a token looks like a tokenizer's special token rather than text."""
    return _SPECIAL.fullmatch(token) is not None


def scale_limit(values: Iterable[float | None]) -> float:
    """Return the largest finite absolute value, the end of a symmetric scale; 0.0 where there is none."""
    return max((abs(v) for v in map(finite, values) if v is not None), default=0.0)


def credit_limit(values: Sequence[float | None]) -> float:
    """Return the end of the scale for credit: the largest absolute value, but at least four times an even share.

    Without that floor an even spread, which singles out no token, would have the strongest colour.
    """
    sizes = [abs(v) for v in map(finite, values) if v is not None]
    return max(max(sizes), EVEN_SHARES * sum(sizes) / len(sizes)) if sizes else 0.0


def level(value: float | None, limit: float) -> float:
    """Return the position of `value` on the scale, from -1 to 1; 0.0 without a value or a limit."""
    number = finite(value)
    if number is None or limit <= 0:
        return 0.0
    return max(-1.0, min(1.0, number / limit))


def blend(position: float) -> str:
    """Return the colour "#rrggbb" at `position` in [-1, 1]: blue, through white, to orange."""
    end = POSITIVE if position > 0 else NEGATIVE
    amount = min(1.0, abs(position))
    return "#" + "".join(f"{round(255 + (c - 255) * amount):02x}" for c in end)
