"""Rows written to a file as JSON lines or Parquet: whole, or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from apportion.errors import ConfigError, DataError
from apportion.system.disk import explain_disk_errors
from apportion.system.paths import local_path

FORMS = (".jsonl", ".parquet")


def output_path(name: str) -> Path:
    """Return the path of a file to write. Raises ConfigError for another ending than .jsonl and .parquet."""
    path = local_path(name, "output", ConfigError)
    if path.suffix.lower() not in FORMS:
        raise ConfigError("output", name, "a file that ends in .jsonl or .parquet", "Rename it.")
    return path


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> int:
    """Write `rows` to `path`, replacing what is there when all are written; return their number.

    Raises:
        DataError: of Parquet, a column that holds texts in some rows and messages in others. DiskError.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with explain_disk_errors(path.parent):
            path.parent.mkdir(parents=True, exist_ok=True)
            number = _write_parquet(part, rows) if path.suffix.lower() == ".parquet" else _write_json(part, rows)
            os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    return number


def _write_json(path: Path, rows: Iterable[Mapping[str, Any]]) -> int:
    number = 0
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            number += 1
        file.flush()
        os.fsync(file.fileno())
    return number


def _write_parquet(path: Path, rows: Iterable[Mapping[str, Any]]) -> int:
    import pyarrow
    import pyarrow.parquet

    listed = [dict(row) for row in rows]
    try:
        table = pyarrow.Table.from_pylist(listed)
    except (pyarrow.ArrowException, TypeError) as error:
        got = f"{path.name} ({str(error).splitlines()[0][:120]})"
        fix = "Write a .jsonl file, or keep text prompts and conversations in databases of their own."
        raise DataError("output", got, "columns of one type each", fix) from error
    pyarrow.parquet.write_table(table, path)
    return len(listed)
