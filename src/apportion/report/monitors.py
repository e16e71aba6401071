"""The section on monitors: the steps where each fired, skipped updates, and crash dumps of stopped runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from apportion.monitors import MONITORS
from apportion.report.read import RunData
from apportion.report.style import finite

PREFIX = "monitors/"
SPANS = 8  # largest number of step ranges shown for a monitor


def monitors_html(runs: Sequence[RunData]) -> str:
    """Return the section for all runs; empty where no monitor fired, no update was skipped and no run stopped."""
    parts = [(run, html) for run in runs if (html := _stopped(run) + _skipped(run) + _fired(run))]
    named = len(runs) > 1
    return "".join((f"<h3>{escape(run.name)}</h3>" if named else "") + html for run, html in parts)


def fired(metrics: Sequence[Mapping[str, Any]], key: str) -> list[tuple[int, float]]:
    """Return (step, value) of each line of metrics.jsonl in which `key` is a number above 0."""
    values = ((int(finite(row.get("step")) or 0), finite(row.get(key))) for row in metrics)
    return [(step, value) for step, value in values if value is not None and value > 0]


def spans(steps: Sequence[int]) -> str:
    """Return increasing integers as ranges, "3\u20135, 9"; at most `SPANS` of them."""
    runs: list[list[int]] = []
    for step in steps:
        if runs and step == runs[-1][1] + 1:
            runs[-1][1] = step
        else:
            runs.append([step, step])
    shown = [str(a) if a == b else f"{a}\u2013{b}" for a, b in runs[:SPANS]]
    return ", ".join(shown) + (", \u2026" if len(runs) > SPANS else "")


def _fired(run: RunData) -> str:
    rows = []
    for name, make in MONITORS.items():
        steps = [step for step, _ in fired(run.metrics, PREFIX + name)]
        if steps:
            monitor = make()
            where = f"{spans(steps)} <span class='unit'>({len(steps)} of {len(run.metrics)})</span>"
            texts = (f"Expected: {monitor.expected}.", f"Likely causes: {monitor.causes}.", f"{monitor.fix}.")
            prose = "".join(f"<p>{escape(text)}</p>" for text in texts)
            rows.append(f'<tr><th scope="row">{escape(name)}</th><td>{where}</td><td class="prose">{prose}</td></tr>')
    if not rows:
        return ""
    head = "<tr><th scope='col'>Monitor</th><th scope='col'>Steps</th><th scope='col'>What it means</th></tr>"
    return f'<div class="scroll"><table class="words">{head}{"".join(rows)}</table></div>'


def _skipped(run: RunData) -> str:
    skipped = fired(run.metrics, f"{PREFIX}skipped_updates")
    if not skipped:
        return ""
    count, steps = f"{sum(value for _, value in skipped):.0f}", spans([step for step, _ in skipped])
    text = f"{count} updates were skipped, because their loss or gradient was not finite: steps {steps}."
    return f'<div class="prose"><p>{escape(text)}</p></div>'


def _stopped(run: RunData) -> str:
    dumps = [f"{dump['name']}: {dump['error']} ({dump['rollouts']} rollouts saved)" for dump in run.stopped]
    notes = "".join(f"<p>{escape(text)}</p>" for text in dumps)
    return f'<div class="notice" role="note">{notes}</div>' if notes else ""
