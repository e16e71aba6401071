"""The results page: agreement, progress, times and biases on one self-contained page."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from html import escape
from importlib import resources
from typing import Any

from apportion.intervals import Interval
from apportion.label.results.figures import results
from apportion.label.store import Store
from apportion.report.document import asset, document
from apportion.report.style import MINUS, number, rounded

# a table that is wider than the screen: keys scroll it
SCROLL = '<div class="scroll" tabindex="0" role="region" aria-label="Table">'
EXCERPT = 600  # characters of a text in the list of disagreements


def results_page(store: Store, title: str) -> tuple[str, str]:
    """Return (the page, its content security policy)."""
    html = page(results(store), title)
    return html, html.split('Content-Security-Policy" content="', 1)[1].split('"', 1)[0].replace("&#x27;", "'")


def page(found: Mapping[str, Any], title: str) -> str:
    """Return the page of `figures.results`."""
    from plotly.offline import get_plotlyjs  # slow to load

    sections = [
        ("agreement", "Agreement", _agreement(found)),
        ("position", "Position and length", _bias(found)),
        ("time", "Progress and time", _time(found)),
        ("annotators", "Annotators", _annotators(found["annotators"])),
        ("disagreements", "Where they disagree most", _disagreements(found["disagreements"])),
        ("method", "How the numbers were computed", METHOD),
    ]
    body = _header(found, title, sections)
    body += "".join(f'<section id="{i}"><h2>{name}</h2>{html}</section>' for i, name, html in sections)
    style = resources.files("apportion.label").joinpath("results", "assets", "results.css").read_text("utf-8")
    script = resources.files("apportion.label").joinpath("results", "assets", "results.js").read_text("utf-8")
    data = {"result-data": _chart_data(found)}
    styles = [asset("base.css"), asset("report.css"), style]
    return document(f"Results: {title}", body + "</main>", data=data, styles=styles, scripts=[get_plotlyjs(), script])


def _header(found: Mapping[str, Any], title: str, sections: Sequence[tuple[str, str, str]]) -> str:
    links = "".join(f'<a href="#{anchor}">{name}</a>' for anchor, name, _ in sections)
    total, stamp = found["totals"], time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    share = found["ranked"] / max(1, total["wanted"])
    cards = (
        _card("Rankings", f"{found['ranked']}", f"of {total['wanted']} wanted ({share:.0%})")
        + _card("Items finished", f"{total['closed']}", f"of {total['items']}")
        + _card("Agreement, ordinal α", number(found["agreement"]["alpha_ranks"]), _on(found["agreement"]["items"]))
        + _card("Median time an item", *_median(found["seconds"]))
    )
    return (
        f'<header class="top"><p class="kicker">apportion label · results</p><h1>{escape(title)}</h1>'
        f'<p class="unit stamp">{stamp}</p><nav aria-label="Sections">{links}</nav></header>'
        f'<main><section class="first" aria-label="Summary"><div class="cards">{cards}</div></section>'
    )


def _card(name: str, value: str, detail: str) -> str:
    return (
        f'<div class="card"><p class="run-name">{escape(name)}</p>'
        f'<p class="figure"><strong>{escape(value)}</strong></p>'
        f'<p class="interval">{escape(detail)}</p></div>'
    )


def _on(items: int) -> str:
    return f"on {items} item{'s' * (items != 1)} that several people ranked"


def _median(seconds: Sequence[float]) -> tuple[str, str]:
    if not seconds:
        return "–", "no rankings"
    ordered = sorted(seconds)
    return f"{ordered[len(ordered) // 2]:.0f} s", f"{sum(ordered) / 3600:.1f} hours in all"


def _agreement(found: Mapping[str, Any]) -> str:
    one = found["agreement"]
    if not one["items"]:
        return '<p class="prose">No item has been ranked by two people; the share is set by <code>--overlap</code>.</p>'
    rows = [
        ("Krippendorff’s α of the ranks (ordinal)", number(one["alpha_ranks"]), "answers of shared items"),
        ("Krippendorff’s α of preferences (nominal)", number(one["alpha_pairs"]), "pairs of answers"),
        ("Kendall’s τ-b, mean", _interval(one["tau"]), f"two people on an item; {one['tau_undefined']} not defined"),
    ]
    lines = "".join(f"<tr><th>{name}</th><td>{value}</td><td>{unit}</td></tr>" for name, value, unit in rows)
    table = f'{SCROLL}<table class="words"><tbody>{lines}</tbody></table></div>'
    return table + _figure("taus", "Kendall’s τ of two people on an item", "1 is the same order, −1 the opposite one")


def _bias(found: Mapping[str, Any]) -> str:
    if not found["positions"]:
        return '<p class="prose">No ranking has all answers judged.</p>'
    text = "Answers are shuffled for each person, so that without bias every position is the best equally often."
    length = (
        f"Kendall’s τ between an answer’s length and its place: {_interval(found['length'])} (1: longer is better)."
    )
    chart = _figure("positions", "Best answer by position on the page", "share of rankings, 95% interval; line: chance")
    return f'<div class="prose"><p>{text}</p><p>{length}</p></div>{chart}'


def _time(found: Mapping[str, Any]) -> str:
    if not found["seconds"]:
        return '<p class="prose">No rankings.</p>'
    progress = _figure("progress", "Rankings", "in the order of arrival")
    seconds = _figure("seconds", "Time an item", "seconds on the screen")
    return f'<div class="charts count-2">{progress}{seconds}</div>'


def _annotators(rows: Sequence[Mapping[str, Any]]) -> str:
    if not rows:
        return '<p class="prose">Nobody has ranked an item.</p>'
    names = ("ranked", "skipped", "median s", "ties", "cannot judge", "first place", "length τ", "τ with others")
    head = "<tr><th>annotator</th>" + "".join(f"<th>{name}</th>" for name in names) + "</tr>"
    lines = []
    for one in rows:
        seconds = "–" if one["seconds"] is None else f"{one['seconds']:.0f}"
        cells = [one["ranked"], one["skipped"], seconds, _percent(one["ties"]), _percent(one["cannot_judge"])]
        cells += [_points(one["first_excess"]), _interval(one["length"]), _interval(one["tau"])]
        lines.append(f"<tr><th>{escape(one['name'])}</th>" + "".join(f"<td>{c}</td>" for c in cells) + "</tr>")
    note = "first place: how much more often than by chance the answer shown first was the best, in percentage points."
    return f'{SCROLL}<table>{head}{"".join(lines)}</table></div><p class="note">{note}</p>'


def _disagreements(rows: Sequence[Mapping[str, Any]]) -> str:
    if not rows:
        return '<p class="prose">No shared item has different orders.</p>'
    return "".join(_disagreement(one) for one in rows)


def _disagreement(one: Mapping[str, Any]) -> str:
    names = list(one["ranks"])
    head = "<tr><th>answer</th>" + "".join(f"<th>{escape(name)}</th>" for name in names) + "</tr>"
    lines = []
    for i, text in enumerate(one["completions"]):
        ranks = "".join(f"<td>{_rank(one['ranks'][name][i])}</td>" for name in names)
        lines.append(f'<tr><th class="text">{escape(_text(text))}</th>{ranks}</tr>')
    title = escape(_text(one["prompt"])[:110])
    return (
        f"<details><summary>τ {number(one['tau'], signed=True)} · {title}</summary>"
        f'{SCROLL}<table class="ranks">{head}{"".join(lines)}</table></div></details>'
    )


def _rank(rank: int | None) -> str:
    return "cannot judge" if rank is None else str(rank)


def _text(value: Any) -> str:
    turns = [value] if isinstance(value, str) else [f"{t.get('role')}: {t.get('content')}" for t in value]
    text = "\n".join(turns)
    return text if len(text) <= EXCERPT else text[:EXCERPT] + " …"


def _figure(name: str, title: str, unit: str) -> str:
    return (
        f'<figure class="chart"><figcaption>{title}<span class="unit">{unit}</span></figcaption>'
        f'<div class="plot" data-chart="{name}" role="img" aria-label="{title}, {unit}"></div></figure>'
    )


def _interval(value: Interval | None) -> str:
    if value is None:
        return "–"
    mean, low, high = (number(value[name], signed=True) for name in ("mean", "low", "high"))
    return f'{mean} <span class="interval">[{low}, {high}]</span>'


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.0%}"


def _points(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:+.0f}".replace("-", MINUS)


def _chart_data(found: Mapping[str, Any]) -> dict[str, Any]:
    positions = found["positions"]
    return {
        "taus": rounded(found["agreement"]["taus"]),
        "seconds": rounded(found["seconds"]),
        "progress": [round(1000 * moment) for moment in found["times"]],
        "positions": {
            "position": [one["position"] for one in positions],
            "share": rounded([one["share"]["mean"] for one in positions]),
            "low": rounded([one["share"]["low"] for one in positions]),
            "high": rounded([one["share"]["high"] for one in positions]),
            "chance": rounded([one["chance"] for one in positions]),
        },
    }


METHOD = """<div class="prose"><p>Krippendorff’s α is computed by NLTK. Its units are the answers of items
that two or more people ranked, its values their ranks (ordinal), or the pairs of these answers and which one is better
(nominal); “cannot judge” is missing. Kendall’s τ-b is SciPy’s, over the answers that both people judged; it is not
defined where one of them tied all of them. Intervals are 95%, normal, over rankings or pairs of people; people who
rank many items weigh more.</p><p>Rankings that were undone are left out, and so are refused ones: a second ranking of
an item by the same person that did not say that it replaces the first.</p></div>"""
