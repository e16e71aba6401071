"""Readers of the files that trackers write, and the installation of a tracker in a folder of its own."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PINNED = {"trackio": ("trackio==0.43.0", "gradio-client==2.7.2", "orjson==3.13.0", "brotli==1.2.1", "websockets==17.4")}


def scalars(folder: Path) -> dict[str, dict[int, float]]:
    """Return {metric: {step: value}} of tensorboard's event files in `folder`, without its subfolders."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    found: dict[str, dict[int, float]] = {}
    for tag in events.Tags()["scalars"]:
        points = events.Scalars(tag)
        found[tag] = {point.step: point.value for point in points}
        assert len(found[tag]) == len(points), f"{tag}: a step twice"
    return found


def wandb_history(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return (settings, rows of metrics) of the offline runs of wandb in `folder`, oldest first."""
    from wandb.proto import wandb_internal_pb2

    config: dict[str, Any] = {}
    rows: list[dict[str, Any]] = []
    for path in sorted(folder.glob("offline-run-*/run-*.wandb")):
        for data in leveldb_records(path.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            config |= values(record.config.update) | values(record.run.config.update)
            if record.history.item:
                rows.append(values(record.history.item))
    return config, rows


def values(items: Any) -> dict[str, Any]:
    """Return wandb's items as {name: value}."""
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}


def leveldb_records(data: bytes) -> Iterator[bytes]:
    """Yield the records of wandb's file: a header of 7 bytes, then LevelDB's log format in blocks of 32 KiB.

    Each part of a record is preceded by its checksum (4 bytes), length (2) and kind (1: whole, 2: first, 3: middle,
    4: last).
    """
    place, parts = 7, b""
    while place + 7 <= len(data):
        if (1 << 15) - place % (1 << 15) < 7:
            place += (1 << 15) - place % (1 << 15)
            continue
        length, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        parts += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):
            yield parts
            parts = b""


def trackio_rows(folder: Path, project: str) -> list[tuple[str, int, str]]:
    """Return (run, step, metrics as JSON) of trackio's local database of a project."""
    with sqlite3.connect(folder / f"{project}.db") as database:
        rows: list[tuple[str, int, str]] = database.execute(
            "SELECT run_name, step, metrics FROM metrics ORDER BY id"
        ).fetchall()
    return rows


def install(name: str, folder: Path) -> Path:
    """Install a tracker whose pins do not fit ours, without its dependencies, into `folder`; return it."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    done = subprocess.run([*command, "--target", str(folder), *PINNED[name]], capture_output=True, text=True)
    assert done.returncode == 0, f"pip could not install {name}: {done.stderr}"
    return folder
