"""Rows of a table with their location, and checks of its column names."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from apportion.errors import DataError

NO_CLASSES: Mapping[str, Sequence[str]] = MappingProxyType({})


class Row(dict[str, Any]):
    """One row of a table: column -> value.

    Attributes:
        where: its location ("reviews.csv, line 3") for error messages.
        classes: the names of the classes in columns whose values are their numbers, where the file stores these names
            (`ClassLabel` of the library datasets).
    """

    __slots__ = ("classes", "where")

    def __init__(
        self,
        values: Mapping[str, Any] | Iterable[tuple[str, Any]],
        where: str,
        classes: Mapping[str, Sequence[str]] = NO_CLASSES,
    ) -> None:
        super().__init__(values)
        self.where, self.classes = where, classes


class Unreadable(NamedTuple):
    """An unreadable row between readable ones: its location, the error, and its text."""

    where: str
    error: DataError
    text: str


Items = Iterator[Row | Unreadable]


def check_columns(names: Sequence[str], where: str, field: str) -> None:
    """Raise DataError for a table with a duplicate column."""
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        got = f"{where}: columns {', '.join(names)[:300]}"
        raise DataError(field, got, "each column once", f"Rename or drop one {repeated[0]!r}.")


def require_columns(present: Iterable[str], where: str, columns: Sequence[str], field: str) -> None:
    """Raise DataError for a table without one of `columns`, with the most similar name."""
    names = list(present)
    for column in columns:
        if column in names:
            continue
        near = similar(column, names)
        hint = f"Did you mean {near!r}? Rename it" if near else "Rename or add it"
        raise DataError(field, listed(names, where), f"a column {column!r}", f"{hint}.")


def listed(names: Iterable[str], where: str) -> str:
    """Return the columns of a row at `where`, for an error message."""
    return f"{where}: columns {', '.join(names)[:300] or '(none)'}"


def similar(name: str, names: Iterable[str]) -> str | None:
    """Return the most similar of `names`, without regard to case, or None."""
    by_lower = {one.lower(): one for one in names}
    near = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=0.6)
    return by_lower[near[0]] if near else None
