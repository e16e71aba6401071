"""The table of a comparison in the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from apportion.report.style import number

HEAD = ("", "mean", "difference to start", "win rate", "length-controlled")


def comparison_table(figures: Mapping[str, Any]) -> str:
    """Return a table a measure, and one of KL, length and diversity, as lines of text."""
    names = [figures["start"], *figures["policies"]]
    parts = []
    for key in figures["measures"]:
        rows = [(key, *HEAD[1:])]
        for name in names:
            one = figures["figures"][name]["measures"][key]
            cells = (_span(one.get("mean")), _span(one.get("difference"), signed=True))
            rates = (_percent(one.get("win_rate")), _percent(one.get("length_controlled_win_rate")))
            rows.append((name, *cells, *rates))
        parts.append(_aligned(rows))
    rows = [("text", "KL, nats an answer", "perplexity", "tokens", "distinct-2")]
    for name in names:
        one = figures["figures"][name]
        kl, perplexity, length = (_span(one[field]) for field in ("kl", "perplexity", "length"))
        rows.append((name, kl, perplexity, length, number(one["distinct"]["2"])))
    parts.append(_aligned(rows))
    notes = "".join(f"left out: {line}\n" for line in figures["left_out"])
    start, count = figures["start"], figures["prompts"]
    return "\n".join(parts) + f"{notes}({count} prompts, 95% intervals, win rates against {start})\n"


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)
    return "\n".join(lines) + "\n"


def _span(value: Mapping[str, float] | None, signed: bool = False) -> str:
    if value is None:
        return "–"
    size = max(abs(value["low"]), abs(value["high"]))
    mean, low, high = (number(value[key], signed, size) for key in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"


def _percent(value: Mapping[str, float] | None) -> str:
    if value is None:
        return "–"
    return f"{value['mean']:.1%} [{value['low']:.1%}, {value['high']:.1%}]"
