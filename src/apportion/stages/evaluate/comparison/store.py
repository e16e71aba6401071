"""Results on the way: files of JSON lines that are written whole, and read instead of computed again."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from apportion.system import disk
from apportion.training.run_folder import RunFolder

Rows = list[dict[str, Any]]


def stored(run: RunFolder, name: str, make: Callable[[], Iterable[Mapping[str, Any]]]) -> Rows:
    """Return the rows of file `name` in the run folder, which `make` makes where it is not there yet.

    They come from the file both times, so that a resumed comparison has the numbers of an uninterrupted one.
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
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]
