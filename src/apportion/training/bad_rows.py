"""Where a stage writes the rows of its data that cannot be used, when it may leave any out."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from apportion.data import BadRows
from apportion.distributed import collectives
from apportion.system import stderr
from apportion.training.run_folder import explained

NAME = "bad_rows.jsonl"


@contextmanager
def leaving_out(folder: Path, wanted: bool, name: str = NAME) -> Iterator[BadRows | None]:
    """Give the place for bad rows, file `name` in the run folder, or None unless they are `wanted` there.

    A file of an earlier try is removed, since the data is read from its beginning. At the end one line on stderr says
    how many rows were left out. Of several processes one writes and speaks.

    Raises:
        DiskError: the file cannot be written.
    """
    path = folder / name
    if collectives.is_main():
        with explained(folder):
            path.unlink(missing_ok=True)
    if not wanted:
        yield None
        return

    def write(rows: Sequence[Mapping[str, Any]]) -> None:
        if collectives.is_main():
            with explained(folder), path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)

    bad = BadRows(write)
    try:
        yield bad
    finally:
        bad.flush()
        if bad.count and collectives.is_log_rank():
            _say(f"warning: {bad.count} bad row{'s' * (bad.count > 1)} left out; {path} says which and why.")


def _say(line: str) -> None:
    stderr.write(f"{line}\n")
