"""Rows of a table by its source: a CSV, JSON-lines, JSON or Parquet file, a folder of them, or a hub dataset."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from apportion.data.formats import READERS, Row
from apportion.errors import DataError, message

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_BESIDE_DATA = {"", ".md", ".yaml", ".yml"}  # what a dataset folder holds beside its tables: cards, licences


def read_rows(source: str, columns: Sequence[str] = (), *, field: str) -> list[Row]:
    """Read every row of `source`; nothing is dropped but blank lines.

    Args:
        source: a `.csv`, `.jsonl`, `.json` or `.parquet` file, a folder with such files (read in the order of their
            names), or the id of a hub dataset (its "train" split). What exists on disk is never looked up on the hub.
        columns: columns that each row must have, neither null nor blank. Other columns are kept as they are.
        field: the configuration key that gave `source`, for error messages.

    Returns:
        One dict a row, at least one; each has `where`, its file and line.

    Raises:
        DataError: an absent or unreadable file, an unknown extension, a missing column, no rows, an encoding other
            than UTF-8, a line that does not parse, an empty cell; with the file and the line.
    """
    path = Path(source).expanduser()
    if not source.strip():  # Path("") is the working folder
        raise DataError(message(field, source, "a file, folder or hub dataset", "Name one."))
    if path.is_dir():
        tables = [(str(file), _reader(file, field)(file, field)) for file in _tables_in(path, field)]
    elif path.is_file():
        tables = [(source, _reader(path, field)(path, field))]
    elif path.suffix.lower() in READERS or not _HUB_ID.fullmatch(source):
        raise DataError(message(field, source, "a file, folder or hub dataset that exists", _near_files(path)))
    else:
        tables = [(source, _hub(source, field))]
    for name, rows in tables:
        if not rows:
            raise DataError(message(field, f"{name}: no rows", "at least one row", "Add rows or give another file."))
        _check_columns(name, rows, columns, field)
    return [row for _, rows in tables for row in rows]


def check_text(row: Row, column: str, *, field: str) -> str:
    """Return the text in `column` of `row`.

    Raises:
        DataError: no such column, not a string, blank, or not encodable (a lone surrogate), with the file and line.
    """
    require(row, column, field=field)
    value = row[column]
    if not isinstance(value, str):
        came = f"{row.where}: {column} = {value!r:.60} ({type(value).__name__})"
        raise DataError(message(field, came, f"text in column {column!r}", "Write it as a string."))
    try:
        value.encode()
    except UnicodeEncodeError as error:
        came = f"{row.where}: {column} has a lone surrogate at character {error.start}"
        raise DataError(message(field, came, "valid Unicode", "Write the character whole or remove it.")) from error
    return value


def require(row: Row, column: str, *, field: str) -> None:
    """Refuse a row without `column`, or with null or blank text in it.

    Raises:
        DataError: with the file and the line.
    """
    if column not in row:
        raise DataError(_missing(row.where, column, row, field))
    value = row[column]
    if value is None or (isinstance(value, str) and not value.strip()):
        came = f"{row.where}: {column} = {value!r:.20}"
        raise DataError(message(field, came, f"a value in column {column!r}", "Fill it in or remove the row."))


def _check_columns(name: str, rows: list[Row], columns: Sequence[str], field: str) -> None:
    for column in columns:
        if not any(column in row for row in rows):
            raise DataError(_missing(name, column, rows[0], field))
        for row in rows:
            require(row, column, field=field)


def _missing(where: str, column: str, present: Iterable[str], field: str) -> str:
    names = list(present)
    by_lower = {name.lower(): name for name in names}
    near = difflib.get_close_matches(column.lower(), by_lower, n=1, cutoff=0.6)
    hint = f"Did you mean {by_lower[near[0]]!r}? Rename it" if near else "Rename or add it"
    came = f"{where}: columns {', '.join(names) or '(none)'}"
    return message(field, came, f"a column {column!r}", f"{hint}.")


def _reader(path: Path, field: str) -> Callable[[Path, str], list[Row]]:
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        mend = "Convert it to one of these, or rename it if it already is one."
        raise DataError(message(field, str(path), "a file that ends in " + ", ".join(READERS), mend))
    return reader


def _tables_in(folder: Path, field: str) -> list[Path]:
    files = sorted(f for f in folder.iterdir() if f.is_file() and not f.name.startswith("."))
    files = [f for f in files if f.suffix.lower() not in _BESIDE_DATA]
    for file in files:
        _reader(file, field)
    if not files:
        inside = ", ".join(sorted(f.name for f in folder.iterdir())[:8]) or "nothing"
        mend = "Give the folder in which the files themselves lie."
        raise DataError(message(field, f"{folder} with {inside}", "a folder with " + ", ".join(READERS), mend))
    return files


def _near_files(path: Path) -> str:
    beside = [f.name for f in path.parent.iterdir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, beside, n=1, cutoff=0.6)
    if near:
        return f"Did you mean {str(path.parent / near[0])!r}?"
    if not path.parent.is_dir():
        return f"There is no folder {str(path.parent)!r}; check the path."
    return "Check the path."


def _hub(source: str, field: str) -> list[Row]:
    from datasets import load_dataset  # heavy, and only a hub id needs it

    try:
        rows = list(load_dataset(source, split="train"))
    except Exception as error:  # the hub client raises errors of a dozen libraries; each ends as one DataError
        came = f"{source!r}: {type(error).__name__}: {str(error).strip()[:300]}"
        mend = "Check the name and the network, or give a local file."
        raise DataError(message(field, came, "a file or folder, or a hub dataset with a train split", mend)) from error
    return [Row(row, f"{source}, row {i}") for i, row in enumerate(rows, 1)]
