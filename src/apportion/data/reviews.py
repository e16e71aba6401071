"""Labelled reviews: the built-in IMDb set or a table with the columns text and label."""

from __future__ import annotations

import re
from typing import NamedTuple

from apportion.data import splits
from apportion.data.assets import BUILTIN_DATA, builtin_table
from apportion.data.bad_rows import BadRows
from apportion.data.formats import Row
from apportion.data.tables import check_text, iter_rows, usable
from apportion.errors import DataError

_LABELS = {"0": 0, "neg": 0, "negative": 0, "1": 1, "pos": 1, "positive": 1}
_LINE_BREAKS = re.compile(r"(?:\s*<br\s*/?>\s*)+", re.IGNORECASE)


class Labelled(NamedTuple):
    """A text and its label: 1 positive, 0 negative."""

    text: str
    label: int


def labelled(
    source: str, part: str | None = None, *, field: str = "data", bad: BadRows | None = None
) -> list[Labelled]:
    """Read labelled texts, in the order of their file.

    Args:
        source: "imdb" (25,000 reviews, half of them positive), or anything that `read_rows` takes, with the columns
            text and label; labels are 0 or 1, neg or pos, negative or positive.
        part: one of `splits.PARTS`, or None for every row.
        field: the configuration key that gave `source`, for error messages.
        bad: the log of invalid rows of a table; None makes the first of them an error.

    Raises:
        DataError: the errors of `read_rows`, another label, or a part without rows.
        ConfigError: an unknown part.
    """
    if part is not None:
        splits.bounds(part)  # an unknown name is an error before the data is downloaded and read
    rows = _imdb() if source in BUILTIN_DATA else _table(source, field, bad)
    if part is None:
        return rows
    chosen = splits.part(rows, part, text=lambda row: row.text)
    if not chosen:
        got = f"{source}: no row of {len(rows)} falls into part {part!r}"
        raise DataError(field, got, "at least one row", "Give more rows, or no part.")
    return chosen


def _table(source: str, field: str, bad: BadRows | None) -> list[Labelled]:
    def row_of(row: Row) -> Labelled:
        return Labelled(check_text(row, "text", field=field), _label(row, field))

    return list(usable(source, row_of, ("text", "label"), field=field, bad=bad))


def _imdb() -> list[Labelled]:
    # the file also has sentences of Rotten Tomatoes, which are not reviews
    rows = iter_rows(str(builtin_table("imdb")), ("text", "label", "source"), field="imdb")
    return [
        Labelled(_LINE_BREAKS.sub("\n", row["text"]).strip(), _label(row, "imdb"))
        for row in rows
        if row["source"] == "imdb"
    ]


def _label(row: Row, field: str) -> int:
    value = row["label"]
    # bool is an int in Python, but true is not a label: it could mean "is negative"
    known = isinstance(value, int | str) and not isinstance(value, bool)
    label = _LABELS.get(str(value).strip().lower()) if known else None
    if label is None:
        fix = "Write 1 or positive for a good review, 0 or negative for a bad one."
        raise DataError(field, f"{row.where}: label = {value!r}", "one of " + ", ".join(_LABELS), fix)
    return label
