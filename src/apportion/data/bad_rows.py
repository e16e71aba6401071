"""Rows that cannot be used: counted and written down with their reason, never left out without a word."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from apportion.data.formats import Row, Unreadable
from apportion.distributed import collectives
from apportion.errors import DataError
from apportion.system import stderr
from apportion.system.disk import explained

LONGEST = 2000  # characters of a row that are kept
NAME = "bad_rows.jsonl"
TOGETHER = 256  # rows that are written at a time

Write = Callable[[Sequence[Mapping[str, Any]]], None]


class BadRows:
    """What was left out of the tables of a run.

    Attributes:
        count: rows left out so far.
    """

    def __init__(self, write: Write) -> None:
        self.count = 0
        self._write, self._waiting = write, list[dict[str, Any]]()

    def add(self, setting: str, item: Row | Unreadable, why: DataError) -> None:
        """Write down `item` of the table that `setting` gave, and why it was left out."""
        text = item.text if isinstance(item, Unreadable) else json.dumps(item, ensure_ascii=False, default=str)
        row = text[:LONGEST].encode("utf-8", "backslashreplace").decode("utf-8")
        self._waiting.append({"setting": setting, "where": item.where, "why": str(why), "row": row})
        self.count += 1
        if len(self._waiting) >= TOGETHER:
            self.flush()

    def flush(self) -> None:
        """Write what waits."""
        if self._waiting:
            self._write(self._waiting)
            self._waiting = []


def judge(source: str, kept: int, bad: int, first: DataError | None, field: str) -> None:
    """Raise DataError when more rows of `source` are bad than can be used."""
    if bad > kept:
        got = f"{source}: {bad} of {kept + bad} rows cannot be used"
        raise DataError(field, got, "at least half of them usable", f"The first of them: {first}")


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
            stderr.write(
                f"warning: {bad.count} bad row{'s' * (bad.count > 1)} left out; {path} lists them with the reasons.\n"
            )
