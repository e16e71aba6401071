"""The file of samples: a row a prompt, whole rows only, continued after any kill, and its form as Parquet."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from apportion.errors import DataError
from apportion.system import disk
from apportion.training.run_folder import RunFolder

LINES, PARQUET = "samples.jsonl", "samples.parquet"
FLOATS = 6  # decimals of a log-probability


class SampleFile:
    """samples.jsonl of a run folder, a row a prompt in the prompts' order.

    Opening it cuts off what a kill left of an unfinished row.

    Attributes:
        count: rows that are there.
    """

    def __init__(self, run: RunFolder, prompts: Sequence[Any]) -> None:
        self.run, self.path, self.count = run, run.path / LINES, 0
        if self.path.is_file():
            self.count = self._recover(prompts)

    def _recover(self, prompts: Sequence[Any]) -> int:
        """Return the number of whole rows, and cut off the rest. Raises DataError where they are of other prompts."""
        count = end = 0
        with self.path.open("rb") as file:
            for line in file:
                if not line.endswith(b"\n"):
                    break
                row = _row(line)
                if row is None or count >= len(prompts) or row.get("prompt") != prompts[count]:
                    got = f"{self.path}, line {count + 1}, which is not of prompt {count + 1}"
                    fix = "Give the prompts that the run began with, or pass --fresh to start over."
                    raise DataError("prompts", got, "the prompts of the run in this folder, in their order", fix)
                count, end = count + 1, end + len(line)
        if end < self.path.stat().st_size:
            os.truncate(self.path, end)
        return count

    def append(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Append rows durably: all of them, or none where the disk is full."""
        made = list(rows)
        self.run.logs.append(LINES, made)
        self.count += len(made)

    def rows(self) -> Iterable[dict[str, Any]]:
        """Yield the rows."""
        with self.path.open(encoding="utf-8") as file:
            for line in file:
                yield json.loads(line)


def _row(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


def to_parquet(lines: Path, retry: Any) -> Path:
    """Write the rows of `lines` to samples.parquet beside it, remove `lines`, and return the new file.

    A kill leaves at least one of the two whole.

    Args:
        retry: `RunFolder.retry_when_full`.
    """
    import pyarrow.json
    import pyarrow.parquet

    path, part = lines.with_name(PARQUET), lines.with_name(f".{PARQUET}.tmp")

    def write() -> None:
        options = pyarrow.json.ReadOptions(use_threads=False, block_size=1 << 26)
        table = pyarrow.json.read_json(lines, read_options=options)
        pyarrow.parquet.write_table(table, part)
        disk.sync(part)

    retry(write, lines.stat().st_size)
    os.replace(part, path)
    disk.sync(path.parent)
    lines.unlink()
    return path
