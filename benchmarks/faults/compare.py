"""Comparison of two runs: the bytes of their final weights, and every row of their logs."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MACHINE = ("time/", "memory/")  # metrics of the machine, not of the result


@dataclass(frozen=True)
class Traces:
    """A finished run: SHA-256 of its weights and of its logs, and the rows of these by (log, step, row)."""

    weights: str
    logs: str
    rows: Counter[tuple[str, int, int]]


def traces(run: Path) -> Traces:
    """Return the traces of the run in folder `run`, without `time/*` and `memory/*`."""
    weights = hashlib.sha256()
    for file in sorted((run / "final").glob("*.safetensors")):
        weights.update(f"{file.name} {file.stat().st_size}\n".encode())
        with file.open("rb") as stream:
            weights.update(hashlib.file_digest(stream, "sha256").digest())
    logs, rows = hashlib.sha256(), Counter[tuple[str, int, int]]()
    for name in ("metrics.jsonl", "rollouts.jsonl"):
        for row in _lines(run / name):
            values = {key: value for key, value in row.items() if not key.startswith(MACHINE)}
            logs.update(json.dumps([name, values], sort_keys=True).encode())
            rows[name, row["step"], row.get("row", 0)] += 1
    return Traces(weights.hexdigest(), logs.hexdigest(), rows)


def _lines(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():  # a reward model has no rollouts
        return []
    # not splitlines(): a generated text may contain U+2028 and the like
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def difference(reference: Traces, resumed: Traces) -> dict[str, Any]:
    """Return whether weights and logs equal the reference's, and the numbers of rows lost and doubled."""
    return {
        "weights": reference.weights == resumed.weights,
        "logs": reference.logs == resumed.logs,
        "rows_lost": sum((reference.rows - resumed.rows).values()),
        "rows_doubled": sum((resumed.rows - reference.rows).values()),
    }
