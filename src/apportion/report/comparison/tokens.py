"""Pages of token heat maps: a prompt each, with the first answer of everyone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from apportion.report.comparison.read import Comparison
from apportion.report.comparison.samples import prompt_text
from apportion.report.comparison.tables import title_of
from apportion.report.document import asset, document
from apportion.report.heatmap import CAUTION, stack_html
from apportion.report.style import finite, number

LOG_RATIO = "log-ratio to the start"
NAMES = {
    "prefix_difference": "Prefix difference: how much each token changes the score of the text so far.",
    "attention": "Attention: the score, spread by the reward model's attention where it reads it.",
    LOG_RATIO: "Log-ratio to the start, nats: positive where the policy makes a token more likely than the start does. "
    "Their sum is the answer's part of the KL.",
}


def heat_map_page(found: Comparison, place: int, styles: str) -> str | None:
    """Return the page of the prompt at `place`, None where nobody has tokens of its answers there."""
    sections, shown = [], set[str]()
    for i, name in enumerate(found.everyone):
        row = found.credit.get((place, name))
        if row is None:
            continue
        methods = methods_of(row, found.samples[place]["policies"][name])
        shown |= methods.keys()
        sections.append(_section(i, name, row, methods))
    if not sections:
        return None
    texts = [text for key, text in NAMES.items() if key in shown] + [CAUTION]
    notes = "".join(f"<p>{text}</p>" for text in texts)
    back = f'<nav aria-label="Pages"><a href="../evaluation.html#prompt-{place + 1}">Back to the comparison</a></nav>'
    body = (
        f'<header class="top"><p class="kicker">apportion evaluate · token heat maps</p><h1>Prompt {place + 1}</h1>'
        f"{back}"
        f'</header><main><section class="first"><p class="model-text prompt">'
        f"{escape(prompt_text(found.samples[place]['prompt']))}</p></section>{''.join(sections)}"
        f'<section class="prose"><h2>Notes</h2>{notes}</section></main>'
    )
    sheets = [asset("base.css"), asset("report.css"), asset("heatmap.css"), asset("comparison.css"), styles]
    return document(f"Token heat maps: prompt {place + 1}", body, data={}, styles=sheets, scripts=[])


def methods_of(row: Mapping[str, Any], sample: Mapping[str, Any]) -> dict[str, Sequence[float]]:
    """Return the values a token to draw, by name: credit of the reward model, and the log-ratio to the start."""
    methods: dict[str, Sequence[float]] = dict(row.get("methods") or {})
    ratios = sample.get("log_ratios")
    if ratios and len(ratios[0]) == len(row["tokens"]):
        methods[LOG_RATIO] = ratios[0]
    return methods


def _section(i: int, name: str, row: Mapping[str, Any], methods: Mapping[str, Sequence[float]]) -> str:
    tokens = [str(token) for token in row["tokens"]]
    score = finite(row.get("score"))
    facts = f"{title_of(str(row.get('measure', '')))} {number(score)} · " if score is not None else ""
    drawn = stack_html(tokens, methods) if methods else f'<p class="model-text">{escape("".join(tokens))}</p>'
    return (
        f'<section id="policy-{i}" class="run-{i}"><h2><i class="dot"></i>{escape(name)}</h2>'
        f'<p class="facts">{facts}{len(tokens)} tokens</p>{drawn}</section>'
    )
