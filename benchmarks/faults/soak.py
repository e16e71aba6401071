"""A long run in one process, watched from outside: its memory and its file handles may not grow."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from benchmarks.faults.harness import clear, place
from benchmarks.faults.kills import Broken
from benchmarks.faults.process import Process
from benchmarks.faults.settings import SoakConfig
from benchmarks.faults.world import arguments, make_world

Tell = Callable[[int, str], None]
LOOK = 0.5  # seconds between looks at the process


def soak(config: SoakConfig, tell: Tell = lambda done, line: None) -> dict[str, Any]:
    """Run `config.batches` batches and return how memory and file handles went after the warm-up.

    Raises:
        Broken: the run failed, or was not the one that was asked for.
    """
    with place(config.folder, "apportion-soak-") as root:
        clear(root, "world", "run")
        make_world(root / "world", config.tokenizer)
        # a rate at which a random model does not diverge over thousands of batches
        more = {"steps": config.batches, "checkpoint_every": 50, "seed": config.seed, "optim.lr": 1e-4}
        words = arguments(root / "world", root / "run", "adapters", **more)
        process = Process(words, root / "run.txt", anew=True)
        handles = _watch(process, root / "run" / "metrics.jsonl", tell)
        if process.wait() != 0:
            raise Broken(f"the run ended with exit code {process.wait()} and said:\n{process.text()}")
        seconds = time.monotonic() - process.began
        rows = [json.loads(line) for line in (root / "run" / "metrics.jsonl").read_text().split("\n") if line]
        if len(rows) != config.batches or not handles:
            raise Broken(f"the run logged {len(rows)} of {config.batches} batches and was seen {len(handles)} times")
    return judged(rows, handles, config.judge_after) | {"seconds": round(seconds, 1)}


def _watch(process: Process, log: Path, tell: Tell) -> list[tuple[int, int]]:
    """Return (batches so far, open file handles) at every look until the process ends."""
    seen, watched = [], psutil.Process(process.pid)
    while process.poll() is None:
        try:
            handles = watched.num_fds()
        except psutil.Error:  # it has just ended
            break
        batches = log.read_bytes().count(b"\n") if log.is_file() else 0
        if batches:
            seen.append((batches, handles))
            tell(batches, f"{handles} file handles")
        time.sleep(LOOK)
    return seen


def judged(rows: list[dict[str, float]], handles: list[tuple[int, int]], judge_after: int) -> dict[str, Any]:
    """Return growth and slope of the memory after `judge_after` batches, and how many handles were open.

    Growth compares the means of the first and the last tenth: single values move with the allocator.
    """
    points = [(row["step"], row["memory/rss_mb"]) for row in rows if row["step"] > judge_after]
    tenth = max(1, len(points) // 10)
    first = statistics.fmean(mb for _, mb in points[:tenth])
    last = statistics.fmean(mb for _, mb in points[-tenth:])
    slope = statistics.linear_regression(*zip(*points, strict=True)).slope
    open_then = [count for batches, count in handles if batches > judge_after]
    half = len(open_then) // 2
    return {
        "batches": len(rows),
        "judge_after": judge_after,
        "memory_mb": {"first": round(first, 2), "last": round(last, 2), "most": round(max(mb for _, mb in points), 2)},
        "memory_growth": (last - first) / first,
        "memory_slope_mb_per_1000": 1000 * slope,
        "handles": {
            "least": min(open_then, default=0),
            "most": max(open_then, default=0),
            "median_first_half": statistics.median(open_then[:half] or [0]),
            "median_second_half": statistics.median(open_then[half:] or [0]),
        },
    }
