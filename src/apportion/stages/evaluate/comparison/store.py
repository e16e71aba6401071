"""Results on the way: files of JSON lines that are written whole, and read instead of computed again."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from apportion.errors import DataError
from apportion.system import disk
from apportion.training.run_folder import RunFolder

Rows = list[dict[str, Any]]


def stored(
    run: RunFolder, name: str, make: Callable[[], Iterable[Mapping[str, Any]]], count: int | None = None
) -> Rows:
    """Return the rows of file `name` in the run folder, which `make` makes where it is not there yet.

    They come from the file both times, so that a resumed comparison has the numbers of an uninterrupted one.

    Raises:
        DataError: the file is damaged, or has not `count` rows.
    """
    path = run.path / name
    if not path.is_file():
        rows = list(make())
        part = f"{name}.tmp"
        path.parent.mkdir(exist_ok=True)
        (run.path / part).unlink(missing_ok=True)
        run.logs.append(part, rows)
        os.replace(run.path / part, path)
        disk.sync(path.parent)
    return read_lines(path, count)


def read_lines(path: Path, count: int | None, fix: str = "Remove it, and it is computed again.") -> Rows:
    """Return the `count` objects (None: any number) of a file that was written before.

    Raises:
        DataError: it is damaged; with `fix`.
    """
    try:
        with path.open(encoding="utf-8") as file:
            rows = [json.loads(line) for line in file]
        if not all(isinstance(row, dict) for row in rows):
            raise ValueError("a line that is no object")
        if count is not None and len(rows) != count:
            raise ValueError(f"{len(rows)} lines instead of {count}")
    except (OSError, ValueError, RecursionError) as error:
        raise DataError("output", f"{path} ({error})", "the JSON lines that were written to it", fix) from error
    return rows
