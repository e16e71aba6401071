"""Buckets of prompts: by the values of a column, by quarters of a number, or by the prompt's length."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from apportion.data.formats.rows import similar
from apportion.errors import ConfigError
from apportion.generation.prompts import PromptStream

LENGTH = "length"
MOST = 24  # values of a column that are buckets of their own
NUMBERS = 6  # more different numbers than these are put into quarters
NONE = "(none)"


class Bucket(NamedTuple):
    """A bucket: its name in tables, and the places of its prompts."""

    name: str
    places: list[int]


def open_buckets(column: str | None, prompts: PromptStream) -> list[Bucket]:
    """Return the buckets by `column`; none where it is None. "length" is the prompt's tokens, unless it is a column.

    Raises:
        ConfigError: no such column, or one with more values than a table has room for.
    """
    if column is None:
        return []
    columns = sorted(frozenset[str]().union(*(one.columns for one in prompts.prompts)))
    if column in columns:
        return _by_value(column, [one.columns.get(column) for one in prompts.prompts])
    if column == LENGTH:
        return quarters([float(len(row)) for row in prompts.rows], "tokens")
    near = similar(column, [*columns, LENGTH])
    hint = f"Did you mean {near!r}?" if near else "Name a column that the file of prompts has."
    raise ConfigError("bucket", column, "a column of the prompts, or length", hint)


def _by_value(column: str, values: Sequence[Any]) -> list[Bucket]:
    known = [value for value in values if value is not None]
    numbers = [float(v) for v in known if isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v)]
    if len(numbers) == len(known) and len(set(numbers)) > NUMBERS:
        given = [None if value is None else float(value) for value in values]
        return quarters(given, column)
    names = [NONE if value is None else _name(value) for value in values]
    order = sorted(set(names), key=lambda name: (name == NONE, -names.count(name), name))
    if len(order) > MOST:
        got, fix = f"{column}, with {len(order)} values", "Name a column of groups, or of numbers."
        raise ConfigError("bucket", got, f"a column of at most {MOST} different values, or of numbers", fix)
    return [Bucket(name, [i for i, one in enumerate(names) if one == name]) for name in order]


def _name(value: Any) -> str:
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 60 else f"{text[:60]}…"


def quarters(values: Sequence[float | None], unit: str) -> list[Bucket]:
    """Return up to four buckets of about equally many prompts, by rising value; equal values stay together."""
    ordered = sorted(value for value in values if value is not None)
    edges = sorted({ordered[(len(ordered) * part) // 4] for part in (1, 2, 3)}) if ordered else []
    places: list[list[int]] = [[] for _ in range(len(edges) + 1)]
    missing = []
    for i, value in enumerate(values):
        if value is None:
            missing.append(i)
        else:
            places[sum(value >= edge for edge in edges)].append(i)
    made = [_range(group, values, unit) for group in places if group]
    return [*made, *([Bucket(NONE, missing)] if missing else [])]


def _range(places: list[int], values: Sequence[float | None], unit: str) -> Bucket:
    own = [value for place in places if (value := values[place]) is not None]
    low, high = min(own), max(own)
    return Bucket(f"{low:g} {unit}" if low == high else f"{low:g}–{high:g} {unit}", places)
