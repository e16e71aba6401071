"""Rows of a table: a CSV, JSON-lines, JSON or Parquet file, a folder of them, or a hub dataset."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from apportion.data.bad_rows import BadRows, check_count
from apportion.data.formats import READERS, Items, Row, Unreadable, require_columns
from apportion.errors import DataError
from apportion.system.paths import local_path

T = TypeVar("T")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_BESIDE_DATA = {".md", ".yaml", ".yml"}  # other files of a dataset folder: cards, licences
_CARDS = {
    "authors",
    "changelog",
    "citation",
    "copying",
    "licence",
    "license",
    "notice",
    "readme",
}  # without a suffix


def iter_rows(source: str, columns: Sequence[str] = (), *, field: str, bad: BadRows | None = None) -> Iterator[Row]:
    """Yield the rows of `source` one in memory at a time (of Parquet, a batch).

    Args:
        source: a `.csv`, `.jsonl`, `.json` or `.parquet` file, a folder with such files (read in the order of their
            names), or the id of a hub dataset (its "train" split). A name that exists on disk is never looked up on the
            hub. A `.json` file that is one list is read at once.
        columns: columns that each row must have, neither null nor blank. Other columns are kept unchanged.
        field: the configuration key that gave `source`, for error messages.
        bad: the log of invalid rows; None makes the first of them an error.

    Yields:
        One dict a row, at least one in all; each has `where`, its file and line. Blank lines are skipped.

    Raises:
        DataError: an absent or unreadable file, an unknown extension, a missing column, no rows, an encoding other
            than UTF-8, a line that does not parse, an empty cell; with the file and the line. With `bad`: an
            error after which no row of the file is certain, and more invalid rows than valid ones.
    """
    return usable(source, lambda row: row, columns, field=field, bad=bad)


def read_rows(source: str, columns: Sequence[str] = (), *, field: str, bad: BadRows | None = None) -> list[Row]:
    """Return every row of `source`, as `iter_rows` yields them."""
    return list(iter_rows(source, columns, field=field, bad=bad))


def usable(
    source: str, make: Callable[[Row], T], columns: Sequence[str] = (), *, field: str, bad: BadRows | None = None
) -> Iterator[T]:
    """Yield `make` of each row of `source`; a DataError that it raises makes the row invalid.

    Otherwise as `iter_rows`.
    """
    valid = left_out = 0
    first: DataError | None = None
    for name, items in _tables(source, columns, field):
        before = valid + left_out
        for item in items:
            try:
                if isinstance(item, Unreadable):
                    raise item.error
                for column in columns:
                    require(item, column, field=field)
                value = make(item)
            except DataError as error:
                if bad is None:
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


def _tables(source: str, columns: Sequence[str], field: str) -> Iterator[tuple[str, Items]]:
    """Yield (name, rows) of each file of `source`, or of the hub dataset."""
    if not source.strip():  # Path("") is the working folder
        raise DataError(field, source, "a file, folder or hub dataset", "Name one.")
    path = local_path(source, field, DataError)
    if os.path.isdir(path):  # unlike Path's methods, these are False without permission
        for file in _tables_in(path, field):
            yield str(file), READERS[file.suffix.lower()](file, field, columns)
    elif os.path.exists(path):
        _check_reader(path, field)
        yield source, READERS[path.suffix.lower()](path, field, columns)
    elif os.path.islink(path):
        fix = "Fix the link, or name the file itself."
        raise DataError(field, f"{source}, a broken link", "a file, folder or hub dataset", fix)
    elif path.suffix.lower() in READERS or not _HUB_ID.fullmatch(source):
        raise DataError(field, source, "a file, folder or hub dataset that exists", _near_files(path))
    else:
        yield source, _hub(source, field)


def _check_reader(path: Path, field: str) -> None:
    if path.suffix.lower() not in READERS:
        fix = "Convert it to one of these, or rename it if it already is one."
        raise DataError(field, str(path), "a file that ends in " + ", ".join(READERS), fix)


def _tables_in(folder: Path, field: str) -> list[Path]:
    try:
        inside = sorted(folder.iterdir())
    except OSError as error:
        fix = "Check its permissions."
        raise DataError(field, f"{folder}: {error.strerror}", "a readable folder", fix) from error
    seen = [f for f in inside if not f.name.startswith(".")]
    files = [f for f in seen if not f.is_dir() and not _is_card(f)]
    for file in files:
        _check_reader(file, field)
    deeper = next((table for f in seen if f.is_dir() for table in _tables_under(f)), None)
    if files and deeper is not None:
        got = f"{folder} with {files[0].name} and, in a folder of its own, {deeper.relative_to(folder)}"
        fix = "Put the tables into one folder, or give one of the folders or files."
        raise DataError(field, got, "tables in one folder", fix)
    if not files:
        names = ", ".join(f.name for f in inside[:8]) or "nothing"
        fix = "Give the folder that contains the files."
        raise DataError(field, f"{folder} with {names}", "a folder with " + ", ".join(READERS), fix)
    return files


def _is_card(file: Path) -> bool:
    return file.suffix.lower() in _BESIDE_DATA or file.name.lower() in _CARDS


def _tables_under(folder: Path) -> Iterator[Path]:
    for place, _, names in os.walk(folder):
        yield from (Path(place, name) for name in sorted(names) if Path(name).suffix.lower() in READERS)


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


def _hub(source: str, field: str) -> Items:
    from datasets import load_dataset, packaged_modules  # heavy, and only needed for a hub id

    if source in packaged_modules._PACKAGED_DATASETS_MODULES:  # `text` would read every file of the working folder
        got, fix = f"{source!r}, a name of file formats on the hub", _near_files(Path(source))
        raise DataError(field, got, "a file, folder or hub dataset that exists", fix)
    try:  # includes the rows: an image is decoded when its row is read, with libraries that may be absent
        for number, row in enumerate(load_dataset(source, split="train"), 1):
            yield Row(row, f"{source}, row {number}")
    except Exception as error:  # the hub client raises errors of a dozen libraries
        got = f"{source!r}: {type(error).__name__}: {str(error).strip()[:300]}"
        fix = "Check the name and the network, or give a local file."
        raise DataError(field, got, "a file or folder, or a hub dataset with a train split", fix) from error
