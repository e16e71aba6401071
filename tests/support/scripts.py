"""`python -m benchmarks.NAME` in a process of its own, from any folder."""

from __future__ import annotations

from pathlib import Path

from benchmarks.harness.environment import environment
from commands import Result, Server, run_python
from examples import LONG


def run_benchmark(name: str, *words: object, folder: Path, heavy: Server | None = None, **variables: str) -> Result:
    """Return the result of benchmark `name`, run in `folder` offline on one thread: a fork of `heavy`, or a new process
    without it and in the long tests."""
    chosen = environment(1) | {"HF_HUB_OFFLINE": "1", **variables}
    if heavy is None or LONG:
        return run_python("-m", f"benchmarks.{name}", *words, cwd=folder, timeout=300, **chosen)
    return heavy.fork(f"benchmarks.{name}", *words, cwd=folder, program="module", **chosen)
