"""Medians, ratios and rates from the measured processes' results, and the check that both sides did the same work."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from apportion.errors import DataError
from benchmarks.harness.measuring import spread

PHASES = ("generate", "score", "reference", "update", "other")
WORK = ("prompts", "prompt_tokens", "generated_tokens", "trained_tokens", "optimizer_steps")


def ratio(above: Sequence[float], below: Sequence[float]) -> dict[str, float]:
    """Return {median, min, max} of above/below over every pair of measurements."""
    return spread([a / b for a in above for b in below])


def summarise(runs: Sequence[Mapping[str, Any]], rates: Mapping[str, float], cuda: bool) -> dict[str, Any]:
    """Return one side's figures from the results of its processes.

    Seconds are medians over all timed batches with min and max, memory is each process's peak (MB), FLOP/s are the
    counted operations of a batch over the median seconds.
    """
    batches = [batch for run in runs for batch in run["batches"]]
    seconds = [batch["total"] for batch in batches]
    work = {name: sum(batch["work"][name] for batch in batches) for name in WORK}
    phases = {name: spread([batch["phases"][name] for batch in batches]) for name in PHASES}
    flop: dict[str, float] = next((run["flop"] for run in runs if run["flop"]), {})
    peaks = [run["peak"]["gpu_mb" if cuda else "rss_mb"] for run in runs]
    medians = {name: value["median"] for name, value in phases.items()} | {"total": median(seconds)}
    return {
        "seconds": spread(seconds),
        "phases": phases,
        "batches": len(batches),
        "batch_seconds": seconds,
        "work": work,
        "tokens_per_s": {
            "generated_in_generate": work["generated_tokens"] / len(batches) / medians["generate"],
            "generated_in_all": work["generated_tokens"] / len(batches) / medians["total"],
            "trained_in_update": work["trained_tokens"] / len(batches) / medians["update"],
        },
        "flop": flop,
        "flops": {name: achieved(count, medians.get(name, 0.0), rates) for name, count in flop.items()},
        "memory_mb": spread(peaks),
        "peak_mb": peaks,
        "peaks": [run["peak"] for run in runs],
        "weights_changed": next((run["changed"] for run in runs if run["changed"] is not None), None),
        "logged": [run["logged"] for run in runs if "logged" in run],
        "versions": runs[0]["versions"],
    }


def achieved(count: float, seconds: float, rates: Mapping[str, float]) -> dict[str, float]:
    """Return FLOP/s of `count` operations in `seconds`, and its share of the measured matmul rates."""
    rate = count / seconds if seconds > 0 else 0.0
    shares = {f"of_{dtype}": rate / rates[f"{dtype}_flops"] for dtype in ("float32", "bfloat16")}
    return {"flops": rate, **shares}


def check_same_work(ours: Mapping[str, int], peer: Mapping[str, int]) -> None:
    """Raise DataError unless both sides did the same work: a ratio of different work is meaningless."""
    different = [name for name in WORK if ours[name] != peer[name]]
    if different:
        got = "; ".join(f"{name.replace('_', ' ')}: ours {ours[name]}, peer {peer[name]}" for name in different)
        fix = "No ratio is given: choose settings under which both do the same (--ours_settings may differ)."
        raise DataError("work of both sides", got, "the same on both", fix)
