"""The tables of a comparison as HTML: a measure each, the text itself, each other, buckets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from apportion.report.comparison.read import Comparison
from apportion.report.style import finite, number

# a table that is wider than the screen: keys scroll it
SCROLL = '<div class="scroll" tabindex="0" role="region" aria-label="Table">'
DASH = "–"


def title_of(key: str) -> str:
    """Return a measure's name on the page, as HTML: "Reward", "Reward short", "Judge imdb"."""
    kind, _, name = key.partition("/")
    return escape(f"{kind.capitalize()} {name}".strip())


def measures_html(found: Comparison) -> str:
    """Return a table a measure: mean, difference to the start, win rate with its shares, length-controlled rate."""
    head = ("policy", "mean", "difference to start", "win rate", "won · tied · lost", "length-controlled", "prompts")
    parts = []
    for key in found.figures["measures"]:
        rows = []
        for i, name in enumerate(found.everyone):
            one = found.of(name)["measures"][key]
            rate = one.get("win_rate")
            cells = [span(one.get("mean")), span(one.get("difference"), signed=True), percent(rate), _shares(rate)]
            cells += [percent(one.get("length_controlled_win_rate")), str(int(one["prompts"]))]
            rows.append((i, name + " (start)" * (i == 0), cells))
        parts.append(f"<h3>{title_of(key)}</h3>{table(head, rows)}")
    return "".join(parts)


def text_html(found: Comparison) -> str:
    """Return the table of KL, perplexity, lengths, cut answers and diversity."""
    head = ["policy", "KL, nats an answer", "a token", "k3 a token", "perplexity", "tokens", "characters", "cut off"]
    head += ["distinct-1", "distinct-2", "distinct-3", "self-similarity"]
    several = any(found.of(name)["self_similarity_of_a_prompt"] is not None for name in found.everyone)
    head += ["within a prompt"] if several else []
    rows = []
    for i, name in enumerate(found.everyone):
        one = found.of(name)
        cells = [span(one[key]) for key in ("kl", "kl_token", "kl_k3_token", "perplexity", "length", "characters")]
        cells += [percent(one["cut"]), *(number(finite(one["distinct"][n])) for n in ("1", "2", "3"))]
        cells.append(number(finite(one["self_similarity"])))
        cells += [number(finite(one["self_similarity_of_a_prompt"]))] if several else []
        rows.append((i, name + " (start)" * (i == 0), cells))
    notes = "".join(f"<p>{escape(str(line))}</p>" for line in found.figures["left_out"])
    return table(head, rows) + (f'<div class="note">{notes}</div>' if notes else "")


def matrix_html(found: Comparison) -> str:
    """Return win rates of everyone against each other, a table a measure; empty where only the start was compared."""
    wins = found.figures.get("wins") or {}
    parts = []
    for key, matrix in wins.items():
        rows = []
        for i, name in enumerate(found.everyone):
            cells = [DASH if other == name else percent(matrix[name][other]) for other in found.everyone]
            rows.append((i, name, cells))
        parts.append(f"<h3>{title_of(key)}</h3>{table(('wins against', *map(escape, found.everyone)), rows)}")
    return "".join(parts)


def buckets_html(found: Comparison) -> str:
    """Return a table a measure by bucket: each policy's difference to the start and win rate."""
    buckets = found.figures.get("buckets")
    if not buckets:
        return ""
    parts = []
    for key in found.figures["measures"]:
        lines = [
            "<tr><th>bucket</th><th>prompts</th><th>policy</th><th>mean</th><th>difference</th><th>win rate</th></tr>"
        ]
        for bucket in buckets["rows"]:
            for i, name in enumerate(found.everyone):
                one = bucket["figures"][name][key]
                first = f"<th>{escape(str(bucket['bucket']))}</th><td>{int(bucket['prompts'])}</td>" if i == 0 else ""
                first = first or "<th></th><td></td>"
                cells = [span(one.get("mean")), span(one.get("difference"), signed=True), percent(one.get("win_rate"))]
                line = "".join(f"<td>{cell}</td>" for cell in cells)
                css = "run-" + str(i) + (" first-row" if i == 0 else "")
                lines.append(
                    f'<tr class="{css}">{first}<td class="name"><i class="dot"></i>{escape(name)}</td>{line}</tr>'
                )
        parts.append(f'<h3>{title_of(key)}</h3>{SCROLL}<table class="by-bucket">{"".join(lines)}</table></div>')
    return f'<p class="note">Prompts by {escape(str(buckets["by"]))}.</p>' + "".join(parts)


def table(head: Sequence[str], rows: Sequence[tuple[int, str, Sequence[str]]]) -> str:
    """Return a table; a row is (number of the colour, name, cells as HTML), `head` is HTML."""
    lines = ["<tr>" + "".join(f"<th>{cell}</th>" for cell in head) + "</tr>"]
    for i, name, cells in rows:
        values = "".join(f"<td>{cell}</td>" for cell in cells)
        lines.append(f'<tr class="run-{i}"><th><i class="dot"></i>{escape(name)}</th>{values}</tr>')
    return f"{SCROLL}<table>{''.join(lines)}</table></div>"


def span(value: Mapping[str, Any] | None, signed: bool = False) -> str:
    """Return a mean with its interval below it, as HTML."""
    if value is None or finite(value.get("mean")) is None:
        return DASH
    low, mean, high = (finite(value.get(key)) for key in ("low", "mean", "high"))
    size = max(abs(one) for one in (low, mean, high) if one is not None)
    below = f"[{number(low, signed, size)}, {number(high, signed, size)}]"
    return f'<b>{number(mean, signed, size)}</b><span class="interval">{below}</span>'


def percent(value: Mapping[str, Any] | None) -> str:
    """Return a share in per cent with its interval below it, as HTML."""
    if value is None:
        return DASH
    low, mean, high = (_points(value.get(key)) for key in ("low", "mean", "high"))
    if value.get("low") is None:
        return f"<b>{mean}%</b>"
    return f'<b>{mean}%</b><span class="interval">[{low}, {high}]</span>'


def _points(value: Any) -> str:
    share = finite(value)
    return DASH if share is None else f"{100 * share:.1f}"


def _shares(rate: Mapping[str, Any] | None) -> str:
    if rate is None:
        return DASH
    return " · ".join(f"{_points(rate.get(key))}" for key in ("win", "tie", "loss"))
