"""Labelled reviews: the built-in IMDb set or a table with the columns text and label."""

from __future__ import annotations

import hashlib
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


def labelled_splits(
    data: str, test_data: str | None, test_texts: int, bad: BadRows | None = None
) -> tuple[list[Labelled], list[Labelled]]:
    """Return (training rows, held-out rows), at most `test_texts` of the second. Raises DataError.

    Without `test_data`, a fixed tenth of `data` is held out by hash of the text; "imdb" has held-out parts of its own.
    """
    if data == "imdb" and test_data is None:
        training, held_out = labelled("imdb", "reward_train"), labelled("imdb", "reward_test")
    elif test_data is not None:
        training = labelled(data, bad=bad)
        held_out = labelled(test_data, field="test_data", bad=bad)
    else:
        rows = labelled(data, bad=bad)
        training = [row for row in rows if splits.bucket(row.text) >= 10]
        held_out = [row for row in rows if splits.bucket(row.text) < 10]
        if not training or not held_out:
            fix = "Give more rows, or held-out ones of their own with --test_data."
            raise DataError("data", f"{len(rows)} rows", "enough to hold a tenth of them out", fix)
    if len({row.label for row in training}) < 2:
        got = f"{len(training)} training rows, all with label {training[0].label}"
        raise DataError("data", got, "rows of both labels", "Give texts of both kinds.")
    # files are often sorted by label: take the held-out texts in the order of a hash
    held_out = sorted(held_out, key=lambda row: hashlib.sha256(row.text.encode()).digest())
    return training, held_out[:test_texts]


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
