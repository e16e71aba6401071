"""The plan of a demo as text: before the work, and beside what the work took."""

from __future__ import annotations

from collections.abc import Mapping

from apportion.stages.demo.plan import SIZES, Plan
from apportion.system.progress import duration
from apportion.system.schedule import Part


def describe(plan: Plan, threads: int) -> str:
    """Return the plan as the lines that are printed before anything is loaded."""
    rates = plan.rates
    low = "" if rates.bfloat16 is None else f"{rates.bfloat16 / 1e9:.0f} GFLOP/s in bfloat16, "
    lines = [
        f"this machine: {low}{rates.float32 / 1e9:.0f} GFLOP/s in float32, reads {rates.reading / 1e9:.0f} GB/s "
        f"({threads} threads)",
        f"the demo computes in {plan.dtype}:",
        "",
        *table(plan),
        "",
        advice(plan),
    ]
    return "\n".join(lines)


def advice(plan: Plan) -> str:
    """Return how the plan relates to the time that the demo aims at."""
    goal = duration(60 * plan.minutes)
    if plan.fits:
        return f"It aims at {goal} on an otherwise idle machine; --minutes, --excerpts and --steps change that."
    if (plan.amounts.excerpts, plan.amounts.steps) == SIZES[0]:
        return f"That is longer than the {goal} it aims at, and the least work that shows what training does."
    return f"That is longer than the {goal} it aims at; smaller --excerpts and --steps take less."


def table(plan: Plan, taken: Mapping[Part, float | None] | None = None) -> list[str]:
    """Return a line for each part of the plan with its time, and with the time it took where `taken` has it."""
    width = max(len(line.words) for line in plan.lines)
    rows, last = [], ""
    for part, words in plan.lines:
        name = "" if part.stage == last else part.stage
        rows.append(f"  {name:<17} {words:<{width}} {duration(part.seconds):>12}{_taken(part, taken)}")
        last = part.stage
    total = f"  {'in all':<17} {'':<{width}} {duration(plan.seconds):>12}"
    if taken is None:
        return [*rows, total]
    done = sum(seconds or 0.0 for seconds in taken.values())
    head = f"  {'':<17} {'':<{width}} {'planned':>12} {'taken':>12}"
    return [head, *rows, f"{total} {duration(done):>12}"]


def _taken(part: Part, taken: Mapping[Part, float | None] | None) -> str:
    if taken is None:
        return ""
    seconds = taken.get(part)
    return f" {'–' if seconds is None else duration(seconds):>12}"
