"""Append-only JSON-lines logs of a run: durable appends, positions for checkpoints, verification and truncation."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from apportion.errors import DiskError
from apportion.system import disk

LOGS = ("metrics.jsonl", "rollouts.jsonl")  # the files that grow with every step
TAIL = 1 << 16  # bytes before a log's end whose checksum a checkpoint holds
Retry = Callable[[Callable[[], None], int], None]  # (work, bytes it writes): repeats the work while the disk is full


class JsonlLogs:
    """The logs in one run folder.

    Args:
        folder: the run folder.
        retry: runs a write, and repeats it while the disk is full (`RunFolder.retry_when_full`).
    """

    def __init__(self, folder: Path, retry: Retry) -> None:
        self.folder, self._retry = folder, retry

    def append(self, name: str, rows: Iterable[Mapping[str, Any]]) -> None:
        """Append JSON lines to file `name`, durably: all of them, or none where the disk is full."""
        text = "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
        data = text.encode("utf-8", errors="backslashreplace")  # half a character becomes its JSON escape
        self._retry(lambda: self._append(name, data), len(data))

    def _append(self, name: str, data: bytes) -> None:
        path = self.folder / name
        handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        before = os.fstat(handle).st_size
        try:
            try:
                while data:
                    data = data[os.write(handle, data) :]
                os.fsync(handle)  # a quota, or a disk over a network, may report only now that it is full
            finally:
                os.close(handle)
        except OSError:
            self._cut_back(path, before)  # a repeated write must not leave its rows twice
            raise

    def _cut_back(self, path: Path, size: int) -> None:
        try:
            os.truncate(path, size)
        except OSError as error:
            got = f"{path} ({error.strerror})"
            fix = "Run the same command again: it resumes from the last checkpoint."
            raise DiskError("output", got, "a log that can be cut back to its last row", fix) from None

    def positions(self) -> dict[str, dict[str, Any]]:
        """Return where the logs end, durably: {name: {"size": bytes, "tail": SHA-256 of the last bytes}}."""
        present = [name for name in LOGS if (self.folder / name).is_file()]
        for name in present:
            disk.sync(self.folder / name)
        disk.sync(self.folder)  # their names
        return {name: self._position(name, (self.folder / name).stat().st_size) for name in present}

    def _position(self, name: str, end: int) -> dict[str, Any]:
        with (self.folder / name).open("rb") as file:
            file.seek(max(0, end - TAIL))
            return {"size": end, "tail": hashlib.sha256(file.read(min(end, TAIL))).hexdigest()}

    def verify(self, positions: Mapping[str, Mapping[str, Any]]) -> str | None:
        """Return what is wrong with the logs up to `positions`, None where every byte is there."""
        for name, position in positions.items():
            path = self.folder / name
            length = path.stat().st_size if path.is_file() else 0
            if length < position["size"]:
                return f"{name} has {length} of the {position['size']} bytes that it had"
            if self._position(name, position["size"]) != position:
                return f"{name} has other bytes before byte {position['size']} than it had"
        return None

    def truncate(self, positions: Mapping[str, Mapping[str, Any]]) -> None:
        """Cut the logs back to `positions`; logs not named there are removed."""
        for name in LOGS:
            path = self.folder / name
            if name in positions:
                os.truncate(path, positions[name]["size"])
            else:
                path.unlink(missing_ok=True)
