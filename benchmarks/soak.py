"""A long run in one process: its resident memory and its file handles must not grow.

    python -m benchmarks.soak --batches 2000 --json

Exit code 1 where memory grows by 2% or more after the warm-up, or more handles are open in the second half than in the
first.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil

from benchmarks.faults.harness import clear, run_root
from benchmarks.faults.kills import UnexpectedEnd
from benchmarks.faults.process import Process
from benchmarks.faults.settings import SoakConfig, check_soak
from benchmarks.faults.world import arguments_of, make_world
from benchmarks.harness.arguments import progress_lines, run_command, write_json

EXAMPLES = """examples:
  python -m benchmarks.soak
  python -m benchmarks.soak --batches 10000 --out soak.json
"""
GROWTH = 0.02  # of memory after the warm-up
POLL = 0.5  # seconds between readings of the process
OnProgress = Callable[[int, str], None]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run for many batches; return 0 where memory and handles stayed flat, else 1."""
    return run_command("soak", SoakConfig, check_soak, _run, EXAMPLES, arguments)


def _run(config: SoakConfig, as_json: bool) -> int:
    result = soak(config, progress_lines(config.batches))
    memory, handles = result["memory_mb"], result["handles"]
    if config.out is not None:
        write_json(config.out, result)
    if as_json:
        sys.stdout.write(json.dumps(result, indent=2) + "\n")
    else:
        sys.stdout.write(
            f"{result['batches']} batches in {result['seconds']:.0f} s, judged after {result['judge_after']}\n"
            f"memory   {memory['first']:.1f} to {memory['last']:.1f} MB: {result['memory_growth']:+.2%}, "
            f"{result['memory_slope_mb_per_1000']:+.3f} MB per 1000 batches\n"
            f"handles  {handles['median_first_half']:g} in the first half, {handles['median_second_half']:g} in the "
            f"second ({handles['least']} to {handles['most']})\n"
        )
    flat = handles["median_second_half"] <= handles["median_first_half"]
    return int(not (result["memory_growth"] < GROWTH and flat))


def soak(config: SoakConfig, on_progress: OnProgress = lambda done, line: None) -> dict[str, Any]:
    """Run `config.batches` batches and return the course of memory and file handles after the warm-up.

    Raises:
        UnexpectedEnd: the run failed, or logged another number of batches.
    """
    with run_root(config.folder, "apportion-soak-") as root:
        clear(root, "world", "run")
        make_world(root / "world", config.tokenizer)
        # a rate at which a random model does not diverge over thousands of batches
        more = {"steps": config.batches, "checkpoint_every": 50, "seed": config.seed, "optim.lr": 1e-4}
        words = arguments_of(root / "world", root / "run", "adapters", **more)
        process = Process(words, root / "run.txt", fork=False)
        handles = _sample_handles(process, root / "run" / "metrics.jsonl", on_progress)
        if process.wait() != 0:
            raise UnexpectedEnd(f"the run ended with exit code {process.wait()} and printed:\n{process.text()}")
        seconds = time.monotonic() - process.began
        rows = [json.loads(line) for line in (root / "run" / "metrics.jsonl").read_text().split("\n") if line]
        if len(rows) != config.batches or not handles:
            raise UnexpectedEnd(
                f"the run logged {len(rows)} of {config.batches} batches and was sampled {len(handles)} times"
            )
    return growth(rows, handles, config.judge_after) | {"seconds": round(seconds, 1)}


def _sample_handles(process: Process, log: Path, on_progress: OnProgress) -> list[tuple[int, int]]:
    """Return (batches logged, open file handles) at every reading until the process ends."""
    samples, observed = [], psutil.Process(process.pid)
    while process.poll() is None:
        try:
            handles = observed.num_fds()
        except psutil.Error:  # it has just ended
            break
        batches = log.read_bytes().count(b"\n") if log.is_file() else 0
        if batches:
            samples.append((batches, handles))
            on_progress(batches, f"{handles} file handles")
        time.sleep(POLL)
    return samples


def growth(rows: list[dict[str, float]], handles: list[tuple[int, int]], judge_after: int) -> dict[str, Any]:
    """Return growth and slope of the memory after `judge_after` batches, and the numbers of open handles.

    Growth compares the means of the first and the last tenth: single values vary with the allocator.
    """
    points = [(row["step"], row["memory/rss_mb"]) for row in rows if row["step"] > judge_after]
    tenth = max(1, len(points) // 10)
    first = statistics.fmean(mb for _, mb in points[:tenth])
    last = statistics.fmean(mb for _, mb in points[-tenth:])
    slope = statistics.linear_regression(*zip(*points, strict=True)).slope
    counts = [count for batches, count in handles if batches > judge_after]
    half = len(counts) // 2
    return {
        "batches": len(rows),
        "judge_after": judge_after,
        "memory_mb": {"first": round(first, 2), "last": round(last, 2), "most": round(max(mb for _, mb in points), 2)},
        "memory_growth": (last - first) / first,
        "memory_slope_mb_per_1000": 1000 * slope,
        "handles": {
            "least": min(counts, default=0),
            "most": max(counts, default=0),
            "median_first_half": statistics.median(counts[:half] or [0]),
            "median_second_half": statistics.median(counts[half:] or [0]),
        },
    }


if __name__ == "__main__":
    sys.exit(main())
