"""The section on monitors: which monitors fired and when, updates that were skipped, what a stopped run left behind."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from apportion.monitors import MONITORS
from apportion.report.numbers import finite
from apportion.report.read import RunData

PREFIX = "monitors/"
SPANS = 8  # spans of steps told of one monitor


def guards_html(runs: Sequence[RunData]) -> str:
    """Return what the monitors of each run found; empty where they found nothing."""
    said = [(run, html) for run in runs if (html := _stopped(run) + _skipped(run) + _watches(run))]
    named = len(runs) > 1
    return "".join((f"<h3>{escape(run.name)}</h3>" if named else "") + html for run, html in said)


def fired(metrics: Sequence[Mapping[str, Any]], key: str) -> list[tuple[int, float]]:
    """Return (step, value) of each line of metrics.jsonl in which `key` is a number above 0."""
    found = ((int(finite(row.get("step")) or 0), finite(row.get(key))) for row in metrics)
    return [(step, value) for step, value in found if value is not None and value > 0]


def spans(steps: Sequence[int]) -> str:
    """Return "3\u20135, 9" of rising whole numbers; the first `SPANS` of them."""
    runs: list[list[int]] = []
    for step in steps:
        if runs and step == runs[-1][1] + 1:
            runs[-1][1] = step
        else:
            runs.append([step, step])
    told = [str(a) if a == b else f"{a}\u2013{b}" for a, b in runs[:SPANS]]
    return ", ".join(told) + (", \u2026" if len(runs) > SPANS else "")


def _watches(run: RunData) -> str:
    rows = []
    for name, make in MONITORS.items():
        steps = [step for step, _ in fired(run.metrics, PREFIX + name)]
        if steps:
            monitor = make()
            where = f"{spans(steps)} <span class='unit'>({len(steps)} of {len(run.metrics)})</span>"
            texts = (f"Expected: {monitor.expected}.", f"Likely causes: {monitor.causes}.", f"{monitor.fix}.")
            told = "".join(f"<p>{escape(text)}</p>" for text in texts)
            rows.append(f'<tr><th scope="row">{escape(name)}</th><td>{where}</td><td class="prose">{told}</td></tr>')
    if not rows:
        return ""
    head = "<tr><th scope='col'>Monitor</th><th scope='col'>Steps</th><th scope='col'>What it means</th></tr>"
    return f'<div class="scroll"><table class="words">{head}{"".join(rows)}</table></div>'


def _skipped(run: RunData) -> str:
    found = fired(run.metrics, f"{PREFIX}skipped_updates")
    if not found:
        return ""
    count, steps = f"{sum(value for _, value in found):.0f}", spans([step for step, _ in found])
    text = f"{count} updates were skipped, because their loss or gradient was not finite: steps {steps}."
    return f'<div class="prose"><p>{escape(text)}</p></div>'


def _stopped(run: RunData) -> str:
    told = [f"{place['name']}: {place['error']} ({place['rollouts']} rollouts saved)" for place in run.stopped]
    notes = "".join(f"<p>{escape(text)}</p>" for text in told)
    return f'<div class="notice" role="note">{notes}</div>' if notes else ""
