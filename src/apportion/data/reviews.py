"""Labelled texts: the built-in IMDb reviews or a table with labels, and their held-out part."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence

from apportion.data import splits
from apportion.data.assets import BUILTIN_DATA, builtin_table
from apportion.data.bad_rows import BadRows
from apportion.data.label_rows import Labelled, Layout, Render, RowReader
from apportion.data.labels import label_of
from apportion.data.tables import iter_rows, usable
from apportion.distributed import launcher
from apportion.errors import ConfigError, DataError
from apportion.system import stderr

_LINE_BREAKS = re.compile(r"(?:\s*<br\s*/?>\s*)+", re.IGNORECASE)
_USUAL = Layout()
Unit = tuple[Labelled, ...]  # a text, or the two of a pair


def labelled(
    source: str,
    part: str | None = None,
    *,
    field: str = "data",
    bad: BadRows | None = None,
    layout: Layout = _USUAL,
    render: Render | None = None,
    pairs: bool = False,
) -> list[Labelled]:
    """Read labelled texts, in the order of their file.

    Args:
        source: "imdb" (25,000 reviews, half of them positive), or anything that `read_rows` takes, with a label
            (`labels.label_of`) and a text, a conversation, or a prompt and a completion (`label_rows.FORMS`).
        part: one of `splits.PARTS`, or None for every row.
        field: the configuration key that gave `source`, for error messages.
        bad: the log of invalid rows of a table; None makes the first of them an error.
        layout: the names of the columns and the split.
        render: renders conversations; None where there is no chat template.
        pairs: whether preference pairs are read: the two texts follow one another, chosen (1) and rejected (0).

    Raises:
        DataError: the errors of `read_rows`, another label, or a part without rows.
        ConfigError: an unknown part.
    """
    if part is not None:
        splits.bounds(part)  # an unknown name is an error before the data is downloaded and read
    if source in BUILTIN_DATA:
        if layout.split is not None:
            raise DataError(field, f"{source} with split {layout.split!r}", "data with splits", "Leave the split out.")
        rows = _imdb()
    else:
        reader = RowReader(layout, field, render, pairs)
        rows = [row for made in usable(source, reader, field=field, bad=bad, split=layout.split) for row in made]
        _report_equal(source, field, reader.equal, len(rows) // 2)
    if part is None:
        return rows
    chosen = splits.part(rows, part, text=lambda row: row.text)
    if not chosen:
        got = f"{source}: no row of {len(rows)} falls into part {part!r}"
        raise DataError(field, got, "at least one row", "Give more rows, or no part.")
    return chosen


def _report_equal(source: str, field: str, equal: int, different: int) -> None:
    """Warn of pairs of two equal texts, which are left out. Raises DataError where there is no other."""
    if not equal:
        return
    if not different:
        got, fix = f"{source}: {equal} pairs, all of two equal texts", "Give pairs whose texts differ."
        raise DataError(field, got, "a pair of different texts", fix)
    if launcher.is_log_rank():
        text = f"{equal} of {equal + different} pairs have two equal texts: they teach nothing and are left out"
        stderr.write(f"warning: {field}: {source}: {text}.\n")


def labelled_splits(
    data: str,
    test_data: str | None,
    test_texts: int,
    bad: BadRows | None = None,
    *,
    layout: Layout = _USUAL,
    render: Render | None = None,
) -> tuple[list[Labelled], list[Labelled]]:
    """Return (training rows, held-out rows), at most `test_texts` of the second; otherwise as `labelled`.

    Without `test_data`, a fixed tenth of `data` is held out by hash of the text, its prompt included; of pairs by hash
    of the prompt, where there are enough prompts. "imdb" has held-out parts of its own. A pair counts as one text.

    Raises:
        DataError: the errors of `labelled`, too few rows, all with one label, or pairs in one of two sources.
        ConfigError: a setting of `layout` that no source has a use for.
    """
    _check_layout(data, test_data, layout)
    if data == "imdb" and test_data is None:
        training, held_out = (units(labelled("imdb", part, layout=layout)) for part in ("reward_train", "reward_test"))
    elif test_data is not None:
        training = units(labelled(data, bad=bad, layout=layout, render=render, pairs=True))
        of_test = layout._replace(split=layout.test_split)
        held_out = units(labelled(test_data, field="test_data", bad=bad, layout=of_test, render=render, pairs=True))
    else:
        rows = units(labelled(data, bad=bad, layout=layout, render=render, pairs=True))
        training, held_out = _tenth_held_out(rows, by_prompt=rows[0][0].paired)
        if not training or not held_out:  # pairs of a few prompts
            training, held_out = _tenth_held_out(rows, by_prompt=False)
        if not training or not held_out:
            fix = "Give more rows, or held-out ones of their own with --test_data."
            raise DataError("data", f"{len(rows)} rows", "enough to hold a tenth of them out", fix)
    if len(training[0]) != len(held_out[0]):
        kinds = ("labelled texts", "preference pairs")
        got, expected = kinds[len(held_out[0]) - 1], f"{kinds[len(training[0]) - 1]}, as in data"
        raise DataError("test_data", got, expected, "Give held-out rows of the same form.")
    if len({row.label for unit in training for row in unit}) < 2:
        got = f"{len(training)} training rows, all with label {training[0][0].label}"
        raise DataError("data", got, "rows of both labels", "Give texts of both kinds.")
    # files are often sorted by label: take the held-out texts in the order of a hash
    held_out = sorted(held_out, key=lambda unit: hashlib.sha256(unit[0].text.encode()).digest())
    return [row for unit in training for row in unit], [row for unit in held_out[:test_texts] for row in unit]


def units(rows: Sequence[Labelled]) -> list[Unit]:
    """Return the texts of `rows` one by one, or two by two where they are pairs."""
    size = 2 if rows and rows[0].paired else 1
    return [tuple(rows[i : i + size]) for i in range(0, len(rows), size)]


def _tenth_held_out(rows: Sequence[Unit], by_prompt: bool) -> tuple[list[Unit], list[Unit]]:
    """Return (training, held-out) texts or pairs by hash of the first text, or only of its prompt where it has one."""
    firsts = [(unit, unit[0].text[: unit[0].prompt or None] if by_prompt else unit[0].text) for unit in rows]
    buckets = [(unit, splits.bucket(text)) for unit, text in firsts]
    return [unit for unit, bucket in buckets if bucket >= 10], [unit for unit, bucket in buckets if bucket < 10]


def _check_layout(data: str, test_data: str | None, layout: Layout) -> None:
    """Raise ConfigError for a setting of `layout` that would be ignored."""
    if layout.test_split is not None and test_data is None:
        fix = "Name the folder as test_data too."
        raise ConfigError("test_split", layout.test_split, "null without test_data", fix)
    columns = [name for name in layout._fields if name.endswith("_column") and getattr(layout, name) is not None]
    if columns and data in BUILTIN_DATA and test_data in (None, *BUILTIN_DATA):
        fix = "Leave it out, or give data of your own."
        raise ConfigError(columns[0], getattr(layout, columns[0]), f"null with the built-in {data}", fix)


def _imdb() -> list[Labelled]:
    # the file also has sentences of Rotten Tomatoes, which are not reviews
    rows = iter_rows(str(builtin_table("imdb")), ("text", "label", "source"), field="imdb")
    return [
        Labelled(_LINE_BREAKS.sub("\n", row["text"]).strip(), label_of(row, "label", "imdb"))
        for row in rows
        if row["source"] == "imdb"
    ]
