"""`python -m benchmarks.NAME` in a process of its own, from any folder."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from benchmarks.harness.environment import environment


def run_benchmark(name: str, *words: object, folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Return the finished process of benchmark `name`, run in `folder` offline on one thread."""
    return subprocess.run(
        [sys.executable, "-m", f"benchmarks.{name}", *map(str, words)],
        cwd=folder,
        env=environment(1) | {"HF_HUB_OFFLINE": "1", **variables},
        capture_output=True,
        text=True,
        timeout=300,
    )
