"""What two runs are compared by: the bytes of their final weights, and every row of their logs."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MACHINE = ("time/", "memory/")  # what says how fast and how large, not what


@dataclass(frozen=True)
class Traces:
    """A finished run: SHA-256 of its weights and of its logs, and which rows these hold, (log, step, row) each."""

    weights: str
    logs: str
    rows: Counter[tuple[str, int, int]]


def traces(run: Path) -> Traces:
    """Return those of the run in folder `run`; `time/*` and `memory/*` do not count."""
    weights = hashlib.sha256()
    for file in sorted((run / "final").glob("*.safetensors")):
        weights.update(f"{file.name} {file.stat().st_size}\n".encode())
        with file.open("rb") as stream:
            weights.update(hashlib.file_digest(stream, "sha256").digest())
    logs, rows = hashlib.sha256(), Counter[tuple[str, int, int]]()
    for name in ("metrics.jsonl", "rollouts.jsonl"):
        for row in _lines(run / name):
            kept = {key: value for key, value in row.items() if not key.startswith(MACHINE)}
            logs.update(json.dumps([name, kept], sort_keys=True).encode())
            rows[name, row["step"], row.get("row", 0)] += 1
    return Traces(weights.hexdigest(), logs.hexdigest(), rows)


def _lines(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():  # a reward model has no rollouts
        return []
    # not splitlines(): a text of the model's may hold U+2028 and the like
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def difference(reference: Traces, found: Traces) -> dict[str, Any]:
    """Return what of `found` is not as in `reference`: whether weights and logs are equal, rows lost and doubled."""
    lost = sum((reference.rows - found.rows).values())
    return {
        "weights": reference.weights == found.weights,
        "logs": reference.logs == found.logs,
        "rows_lost": lost,
        "rows_doubled": sum((found.rows - reference.rows).values()),
    }
