"""The page of a comparison, evaluation.html in its folder, and the pages of token heat maps beside it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from html import escape
from pathlib import Path
from typing import Any

from apportion.report.comparison import tables
from apportion.report.comparison.read import Comparison, read_comparison
from apportion.report.comparison.samples import MOST, heat_map_file, samples_html
from apportion.report.comparison.tokens import heat_map_page
from apportion.report.document import asset, document, write_page
from apportion.report.style import finite, rounded, run_colour

NAME = "evaluation.html"


def write_comparison(folder: Path, output: Path | None = None) -> Path:
    """Draw the comparison in `folder`, and return the page: evaluation.html in it, or `output`.

    The pages of heat maps are written to tokens/ beside it.

    Raises:
        DataError: no finished comparison. DiskError: a page cannot be written.
    """
    found = read_comparison(folder)
    page = folder / NAME if output is None else output
    styles = run_styles(len(found.everyone))
    written = {
        page.parent / heat_map_file(i): heat_map_page(found, i, styles) for i in range(min(len(found.samples), MOST))
    }
    for path, html in written.items():
        if html is not None:
            write_page(html.replace("../evaluation.html", f"../{escape(page.name)}"), path)
    for old in (page.parent / "tokens").glob("prompt-*.html"):
        if written.get(old) is None:
            with suppress(OSError):
                os.unlink(old)
    return write_page(comparison_html(found), page)


def comparison_html(found: Comparison) -> str:
    """Return the page."""
    from plotly.offline import get_plotlyjs  # slow to load

    count = len(found.figures["measures"])
    wins = "".join(
        _figure(f"wins-{i}", tables.title_of(key), "win rate against the start", 70 + 50 * (len(found.everyone) - 1))
        for i, key in enumerate(found.figures["measures"])
    )
    title = tables.title_of(found.main)
    scatter = _figure("kl", f"{title} against KL", "nats an answer; 95% intervals") if _has_kl(found) else ""
    scatter += _figure("length", f"{title} against length", "tokens an answer; 95% intervals")
    sections = [
        ("summary", "Against the start", tables.measures_html(found)),
        ("wins", "Win rates", f'<div class="charts count-{count}">{wins}</div>{WINS}'),
        ("price", "What it cost", f'<div class="charts count-2">{scatter}</div>'),
        ("text", "KL, length and diversity", tables.text_html(found)),
        ("each-other", "Against each other", tables.matrix_html(found)),
        ("buckets", "By bucket", tables.buckets_html(found)),
        ("samples", "Side by side", samples_html(found)),
        (
            "settings",
            "Configuration",
            f"<details><summary>config.yaml</summary><pre>{escape(found.settings)}</pre></details>",
        ),
        ("method", "How the numbers were computed", METHOD),
    ]
    present = [section for section in sections if section[2]]
    body = _header(found, present) + "<main>"
    body += "".join(f'<section id="{i}"><h2>{name}</h2>{html}</section>' for i, name, html in present)
    sheets = ("base.css", "report.css", "heatmap.css", "comparison.css")
    styles = [*map(asset, sheets), run_styles(len(found.everyone))]
    scripts = [get_plotlyjs(), asset("comparison.js")]
    data = {"comparison-data": chart_data(found)}
    return document(f"Evaluation: {found.name}", body + "</main>", data=data, styles=styles, scripts=scripts)


WINS = '<p class="note">A tie counts half. Filled: as counted; hollow: length-controlled. Bars: 95% intervals.</p>'


def _header(found: Comparison, sections: list[tuple[str, str, str]]) -> str:
    items = "".join(
        f'<li class="run-{i}"><i class="dot"></i><b>{escape(name)}</b> <span class="unit">'
        f"{'start · ' if i == 0 else ''}{escape(str(found.of(name)['source']))}</span></li>"
        for i, name in enumerate(found.everyone)
    )
    links = "".join(f'<a href="#{anchor}">{name}</a>' for anchor, name, _ in sections)
    count = int(found.figures["answers_per_prompt"])
    facts = f"{int(found.figures['prompts'])} prompts · {count} answer{'s' * (count != 1)} a prompt"
    return (
        f'<header class="top"><p class="kicker">apportion evaluate</p><h1>{escape(found.name)}</h1>'
        f'<p class="unit">{facts} · seed {int(found.figures["seed"])}</p>'
        f'<ul class="run-list">{items}</ul><nav aria-label="Sections">{links}</nav></header>'
    )


def _figure(name: str, title: str, unit: str, height: int = 240) -> str:
    return (
        f'<figure class="chart"><figcaption>{title}<span class="unit">{unit}</span></figcaption>'
        f'<div class="plot" style="height:{height}px" data-chart="{name}" role="img"'
        f' aria-label="{title}, {unit}"></div>'
        "</figure>"
    )


def _has_kl(found: Comparison) -> bool:
    return any(found.of(name)["kl"] is not None for name in found.everyone[1:])


def run_styles(count: int) -> str:
    """Return the colours of the first `count` entries, on light and dark pages."""
    light = "".join(f".run-{i}{{--run:{run_colour(i).light}}}" for i in range(count))
    dark = "".join(f".run-{i}{{--run:{run_colour(i).dark}}}" for i in range(count))
    return f"{light}\n@media (prefers-color-scheme:dark){{{dark}}}\n"


def chart_data(found: Comparison) -> dict[str, Any]:
    """Return the numbers of the plots: win rates by measure, and the main measure against KL and length."""
    wins = {}
    for i, key in enumerate(found.figures["measures"]):
        rows = []
        for run, name in enumerate(found.everyone):
            one = found.of(name)["measures"][key]
            pair = (_numbers(one.get("win_rate")), _numbers(one.get("length_controlled_win_rate")))
            if run:
                rows.append({"run": run, "raw": pair[0], "controlled": pair[1]})
        wins[f"wins-{i}"] = rows
    points = []
    for run, name in enumerate(found.everyone):
        one = found.of(name)
        mean = _numbers(one["measures"][found.main].get("mean"))
        kl = [0.0, 0.0, 0.0] if run == 0 and _has_kl(found) else _numbers(one["kl"])
        points.append({"run": run, "y": mean, "kl": kl, "length": _numbers(one["length"])})
    colours = [run_colour(i)._asdict() for i in range(len(found.everyone))]
    title = found.main.replace("/", " ")
    return {"names": found.everyone, "colours": colours, "wins": wins, "points": points, "measure": title}


def _numbers(value: Mapping[str, Any] | None) -> list[float | None] | None:
    """Return [low, mean, high], None without a mean."""
    if value is None or finite(value.get("mean")) is None:
        return None
    return rounded([value.get("low"), value.get("mean"), value.get("high")])


METHOD = """<div class="prose"><p><b>Difference.</b> The mean of a policy's score less the start's on the same
prompt, with a percentile bootstrap over prompts that keeps the two together.</p><p><b>Win rate.</b> The share of pairs
of answers to one prompt that the policy wins by score; a tie counts half. Wilson's interval at the effective number of
prompts.</p><p><b>Length-controlled.</b> AlpacaEval 2's logistic model of the preference: quality, tanh of the length
difference over its standard deviation, and the difficulty of the prompt as other policies found it; its prediction at
equal lengths, averaged over the prompts. docs/evaluation.md says where it differs from AlpacaEval's.</p>
<p><b>KL.</b> The log-ratio of the policy to the start, summed over an answer's tokens (k1, nats an answer), also a
token, and as k3, which is never negative. Perplexity is that of the answers under the start.</p><p><b>Diversity.</b>
Distinct-n: different n-grams over all n-grams of the answers; it falls with the amount of text. Self-similarity: the
mean cosine similarity of the token bigrams of answers to different prompts. Intervals are 95%; they cover the choice of
prompts, not of training seeds.</p></div>"""
