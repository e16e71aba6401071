"""Rows of a table: a CSV, TSV, JSON, Parquet or Arrow file, a folder of them, or a hub dataset."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from apportion.data.bad_rows import BadRows, ColumnError, check_count
from apportion.data.folders import files_of
from apportion.data.formats import Items, Row, Unreadable, check_reader, has_reader, read_file, require_columns
from apportion.errors import DataError
from apportion.system.paths import local_path

T = TypeVar("T")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


def iter_rows(
    source: str, columns: Sequence[str] = (), *, field: str, bad: BadRows | None = None, split: str | None = None
) -> Iterator[Row]:
    """Yield the rows of `source` one in memory at a time (of Parquet and Arrow, a batch).

    Args:
        source: a `.csv`, `.tsv`, `.jsonl`, `.json`, `.parquet` or `.arrow` file (text formats also in gzip), a folder
            of them (`folders.files_of`), or the id of a hub dataset. A name that exists on disk is never looked up on
            the hub. A `.json` file that is one list is read at once.
        columns: columns that each row must have, neither null nor blank. Other columns are kept unchanged.
        field: the configuration key that gave `source`, for error messages.
        bad: the log of invalid rows; None makes the first of them an error.
        split: of a folder or a hub dataset; None is "train", or a folder's only one.

    Yields:
        One dict a row, at least one in all; each has `where`, its file and line. Blank lines are skipped.

    Raises:
        DataError: an absent or unreadable file, an unknown extension, a missing column, no rows, an encoding other
            than UTF-8, a line that does not parse, an empty cell; with the file and the line. With `bad`: an
            error after which no row of the file is certain, and more invalid rows than valid ones.
    """
    return usable(source, lambda row: row, columns, field=field, bad=bad, split=split)


def read_rows(
    source: str, columns: Sequence[str] = (), *, field: str, bad: BadRows | None = None, split: str | None = None
) -> list[Row]:
    """Return every row of `source`, as `iter_rows` yields them."""
    return list(iter_rows(source, columns, field=field, bad=bad, split=split))


def first_columns(source: str, *, field: str, split: str | None = None) -> list[str]:
    """Return the columns of the first readable row of `source`; empty where there is none. Raises as `iter_rows`."""
    for _, items in _tables(source, (), field, split):
        for item in items:
            if not isinstance(item, Unreadable):
                return list(item)
    return []


def usable(
    source: str,
    make: Callable[[Row], T],
    columns: Sequence[str] = (),
    *,
    field: str,
    bad: BadRows | None = None,
    split: str | None = None,
) -> Iterator[T]:
    """Yield `make` of each row of `source`; a DataError that it raises makes the row invalid, a ColumnError all rows.

    Otherwise as `iter_rows`.
    """
    valid = left_out = 0
    first: DataError | None = None
    for name, items in _tables(source, columns, field, split):
        before = valid + left_out
        for item in items:
            try:
                if isinstance(item, Unreadable):
                    raise item.error
                for column in columns:
                    require(item, column, field=field)
                value = make(item)
            except DataError as error:
                if bad is None or isinstance(error, ColumnError):
                    raise
                bad.add(field, item, error)
                left_out, first = left_out + 1, first or error
            else:
                valid += 1
                yield value
        if valid + left_out == before:
            raise DataError(field, f"{name}: no rows", "at least one row", "Add rows or give another file.")
    check_count(source, valid, left_out, first, field)


def check_text(row: Row, column: str, *, field: str) -> str:
    """Return the text in `column` of `row`.

    Raises:
        DataError: no such column, not a string, blank, or not encodable (a lone surrogate), with the file and line.
    """
    require(row, column, field=field)
    value = row[column]
    if not isinstance(value, str):
        got = f"{row.where}: {column} = {value!r:.60} ({type(value).__name__})"
        raise DataError(field, got, f"text in column {column!r}", "Write it as a string.")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        got = f"{row.where}: {column} has a lone surrogate at character {error.start}"
        raise DataError(field, got, "valid Unicode", "Write the complete character or remove it.") from error
    return value


def require(row: Row, column: str, *, field: str) -> None:
    """Check that `row` has a value in `column`.

    Raises:
        DataError: it is missing, null or blank; with the file and the line.
    """
    require_columns(row, row.where, (column,), field)
    value = row[column]
    if value is None or (isinstance(value, str) and not value.strip()):
        got = f"{row.where}: {column} = {value!r:.20}"
        raise DataError(field, got, f"a value in column {column!r}", "Fill it in or remove the row.")


def _tables(source: str, columns: Sequence[str], field: str, split: str | None) -> Iterator[tuple[str, Items]]:
    """Yield (name, rows) of each file of `source`, or of the hub dataset."""
    if not source.strip():  # Path("") is the working folder
        raise DataError(field, source, "a file, folder or hub dataset", "Name one.")
    path = local_path(source, field, DataError)
    if os.path.isdir(path):  # unlike Path's methods, these are False without permission
        for file in files_of(path, field, split):
            yield str(file), read_file(file, field, columns)
    elif os.path.exists(path):
        check_reader(path, field)
        if split is not None:
            got = f"{source} with split {split!r}"
            raise DataError(field, got, "a folder or a hub dataset, which have splits", "Leave the split out.")
        yield source, read_file(path, field, columns)
    elif os.path.islink(path):
        fix = "Fix the link, or name the file itself."
        raise DataError(field, f"{source}, a broken link", "a file, folder or hub dataset", fix)
    elif has_reader(path) or not _HUB_ID.fullmatch(source):
        raise DataError(field, source, "a file, folder or hub dataset that exists", _near_files(path))
    else:
        yield source, _hub(source, field, split or "train")


def _near_files(path: Path) -> str:
    try:
        beside = [f.name for f in path.parent.iterdir()] if path.parent.is_dir() else []
    except OSError:  # without permission to list it there is nothing to suggest
        beside = []
    near = difflib.get_close_matches(path.name, beside, n=1, cutoff=0.6)
    if near:
        return f"Did you mean {str(path.parent / near[0])!r}?"
    if not path.parent.is_dir():
        return f"There is no folder {str(path.parent)!r}; check the path."
    return "Check the path."


def _hub(source: str, field: str, split: str) -> Items:
    from datasets import load_dataset, packaged_modules  # heavy, and only needed for a hub id

    if source in packaged_modules._PACKAGED_DATASETS_MODULES:  # `text` would read every file of the working folder
        got, fix = f"{source!r}, a name of file formats on the hub", _near_files(Path(source))
        raise DataError(field, got, "a file, folder or hub dataset that exists", fix)
    try:  # includes the rows: an image is decoded when its row is read, with libraries that may be absent
        dataset = load_dataset(source, split=split)
        classes = {name: one.names for name, one in dataset.features.items() if hasattr(one, "names")}
        for number, row in enumerate(dataset, 1):
            yield Row(row, f"{source}, row {number}", classes)
    except Exception as error:  # the hub client raises errors of a dozen libraries
        got = f"{source!r}: {type(error).__name__}: {str(error).strip()[:300]}"
        fix = "Check the name and the network, or give a local file."
        raise DataError(field, got, f"a file or folder, or a hub dataset with a {split} split", fix) from error
