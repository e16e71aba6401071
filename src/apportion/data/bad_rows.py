"""Invalid rows: counted and logged with their reason, never dropped silently."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from apportion.data.formats import Row, Unreadable
from apportion.distributed import launcher
from apportion.errors import DataError
from apportion.system import stderr
from apportion.system.disk import explain_disk_errors

LONGEST = 2000  # characters of a row that are logged
NAME = "bad_rows.jsonl"
ROWS_AT_ONCE = 256  # rows that are written at a time


class ColumnError(DataError):
    """An error that concerns every row of a table, although it was found in one: no row of it can be left out."""


Write = Callable[[Sequence[Mapping[str, Any]]], None]


class BadRows:
    """The rows that were left out of the tables of a run.

    Attributes:
        count: rows left out so far.
    """

    def __init__(self, write: Write) -> None:
        self.count = 0
        self._write, self._pending = write, list[dict[str, Any]]()

    def add(self, setting: str, item: Row | Unreadable, why: DataError) -> None:
        """Log `item` of the table of `setting`, and the reason."""
        text = item.text if isinstance(item, Unreadable) else json.dumps(item, ensure_ascii=False, default=str)
        row = text[:LONGEST].encode("utf-8", "backslashreplace").decode("utf-8")
        self._pending.append({"setting": setting, "where": item.where, "why": str(why), "row": row})
        self.count += 1
        if len(self._pending) >= ROWS_AT_ONCE:
            self.flush()

    def flush(self) -> None:
        """Write the pending rows."""
        if self._pending:
            self._write(self._pending)
            self._pending = []


def check_count(source: str, usable: int, bad: int, first: DataError | None, field: str) -> None:
    """Raise DataError when more rows of `source` are bad than can be used."""
    if bad > usable:
        got = f"{source}: {bad} of {usable + bad} rows cannot be used"
        raise DataError(field, got, "at least half of them usable", f"The first of them: {first}")


@contextmanager
def leaving_out(folder: Path, wanted: bool, name: str = NAME) -> Iterator[BadRows | None]:
    """Yield the log of invalid rows, file `name` in the run folder, or None unless `wanted`.

    A file of an earlier attempt is removed, since the data is read from its start. At the end one line on stderr gives
    the number of rows left out. Only the main process writes.

    Raises:
        DiskError: the file cannot be written.
    """
    from apportion.distributed import collectives  # loads torch, which reading data does not need

    path = folder / name
    if collectives.is_main():
        with explain_disk_errors(folder):
            path.unlink(missing_ok=True)
    if not wanted:
        yield None
        return

    def write(rows: Sequence[Mapping[str, Any]]) -> None:
        if collectives.is_main():
            with explain_disk_errors(folder), path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)

    bad = BadRows(write)
    try:
        yield bad
    finally:
        bad.flush()
        if bad.count and launcher.is_log_rank():
            stderr.write(
                f"warning: {bad.count} bad row{'s' * (bad.count > 1)} left out; {path} lists them with the reasons.\n"
            )
