"""Accuracies of both sides, their paired difference, and the table of trained bytes and memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from apportion.intervals import Interval, mean_interval, proportion

MOST = 0.02  # of the accuracies' difference
SIDES = ("LoRA", "full")
BYTES = ("weight_bytes", "gradient_bytes", "state_bytes")
# a row of the table: its name, the part that has its bytes, and which of the parts of that run
ROWS = (
    ("reward model", "reward", "all"),
    ("policy", "shared", "policy"),
    ("critic on the policy's trunk", "shared", "critic"),
    ("critic with a trunk of its own", "separate", "critic"),
)


def accuracy(right: Sequence[float]) -> Interval:
    """Return {mean, low, high} of the pairs judged right; Wilson's interval, or the normal one where some are ties."""
    whole = all(one in (0, 1) for one in right)
    return proportion(int(sum(right)), len(right)) if whole else mean_interval(right)


def compared(lora: Sequence[float], full: Sequence[float]) -> dict[str, Any]:
    """Return both accuracies, the paired difference LoRA − full over the pairs, and whether it is under 2 points."""
    difference = mean_interval([a - b for a, b in zip(lora, full, strict=True)])
    found = {"LoRA": accuracy(lora), "full": accuracy(full), "difference": difference}
    return found | {"pairs": len(lora), "passed": abs(difference["mean"]) < MOST}


def shown(interval: Mapping[str, float], sign: str = "") -> str:
    """Return an interval as text, in percent."""
    return f"{interval['mean']:{sign}.1%} [{interval['low']:{sign}.1%}, {interval['high']:{sign}.1%}]"


def rows_of(parts: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the table's rows of the finished parts: what, side, weights, bytes of each kind and together, peak MB.

    Peak memory is that of the whole run, so it is the same for a policy and for the critic that was trained with it.
    """
    rows = []
    for name, run, part in ROWS:
        for side in SIDES:
            found = parts.get(f"{run} {side}")
            if found is not None:
                counted = found["trained"][part]
                total = sum(counted[kind] for kind in BYTES)
                row = {"what": name, "side": side, "run": run, **counted, "bytes": total, "peak_mb": found["peak_mb"]}
                rows.append(row)
    return rows


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the rows as a Markdown table; sizes in MB of a million bytes."""
    head = ["", "trained weights", "weights, MB", "gradients, MB", "optimizer, MB", "together, MB", "run's peak, MB"]
    lines = [head, ["---", *["---:"] * (len(head) - 1)]]
    for row in rows:
        sizes = [f"{row[kind] / 1e6:,.2f}" for kind in (*BYTES, "bytes")]
        lines.append([f"{row['what']}, {row['side']}", f"{row['weights']:,}", *sizes, f"{row['peak_mb']:,.0f}"])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
