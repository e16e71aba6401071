"""File formats of tables: CSV, TSV, JSON lines, JSON lists, Parquet and Arrow, by the extension of their names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from apportion.data.formats.arrow import read_arrow, read_parquet
from apportion.data.formats.delimited import read_csv, read_tsv
from apportion.data.formats.json_rows import MAX_DEPTH, depth, read_json
from apportion.data.formats.rows import Items, Row, Unreadable, check_columns, require_columns
from apportion.data.lines import kind_of
from apportion.errors import DataError

READERS: dict[str, Callable[[Path, str, Sequence[str]], Items]] = {
    ".csv": read_csv,
    ".jsonl": read_json,
    ".json": read_json,
    ".parquet": read_parquet,
    ".tsv": read_tsv,
    ".arrow": read_arrow,
}

PACKED = frozenset({".zst", ".bz2", ".xz", ".zip", ".7z", ".tar", ".tgz", ".lz4"})

__all__ = [
    "MAX_DEPTH",
    "READERS",
    "Items",
    "Row",
    "Unreadable",
    "check_columns",
    "check_reader",
    "depth",
    "has_reader",
    "read_file",
    "require_columns",
]


def has_reader(path: Path) -> bool:
    """Whether a file of this name is read as a table."""
    return kind_of(path) in READERS


def check_reader(path: Path, field: str) -> None:
    """Raise DataError for a file whose name has no extension of a table."""
    if not has_reader(path):
        fix = "Convert it to one of these, or rename it if it already is one."
        if path.suffix.lower() in PACKED:
            fix = f"Unpack it first: of compressed files only gzip is read, not {path.suffix.lower()}."
        expected = "a file that ends in " + ", ".join(READERS) + ", or one of them and .gz"
        raise DataError(field, str(path), expected, fix)


def read_file(path: Path, field: str, columns: Sequence[str] = ()) -> Items:
    """Yield the rows of a table's file, whose name `has_reader`."""
    return READERS[kind_of(path)](path, field, columns)
