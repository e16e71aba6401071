"""The summary: means before and after training with 95% intervals, one card a measure and one line a run."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import NamedTuple

from apportion.report.read import RunData
from apportion.report.style import Interval, interval, number, span


class Card(NamedTuple):
    """A measure of evaluation.json: its title, its unit, and the keys before and after (before may be absent)."""

    title: str
    unit: str
    before: str | None
    after: str


POLICY = (
    Card("Reward", "mean score of the reward model", "reward_before", "reward_after"),
    Card("Judge", "mean score of the judge", "judge_before", "judge_after"),
    Card("KL from the reference", "nats a sequence", None, "kl"),
    Card("Distinct-2", "share of distinct bigrams", "distinct2_before", "distinct2_after"),
    Card("Perplexity", "of the continuations", "perplexity_before", "perplexity_after"),
)
REWARD = (
    Card("Accuracy", "share of held-out excerpts or pairs that the score judges right", None, "accuracy"),
    Card("Length alone", "accuracy where the longer answer is taken for the better one", None, "length_only"),
    Card("Gain over length", "difference of the two accuracies", None, "gain_over_length"),
    Card("Score and length", "correlation within a prompt", None, "length_correlation_within_prompt"),
    Card("Calibration error", "expected calibration error; 0 is perfect", None, "ece"),
    Card("Score", "mean on held-out texts", None, "score_mean"),
    Card("Spread of the score", "standard deviation", None, "score_sd"),
)
SUPERVISED = (
    Card("Held-out loss", "nats a token of demonstrations", "nll_before", "nll_after"),
    Card("Held-out perplexity", "of demonstrations", "perplexity_before", "perplexity_after"),
    Card("Held-out accuracy", "share of pairs that the implicit reward ranks right", "accuracy_reference", "accuracy"),
    Card("Held-out margin", "implicit reward of chosen less rejected, nats", None, "margin"),
)

ARROW = " \u2192 "

Line = tuple[int, str, Interval | None, Interval]


def cards_html(runs: Sequence[RunData], cards: Sequence[Card]) -> str:
    """Return the cards with a number in at least one run's evaluation; empty where there are none."""
    built = [card_html(card, lines, len(runs) > 1) for card in cards if (lines := _lines(runs, card))]
    return f'<div class="cards count-{len(built)}">{"".join(built)}</div>' if built else ""


def _lines(runs: Sequence[RunData], card: Card) -> list[Line]:
    lines = []
    for i, run in enumerate(runs):
        after = interval(run.evaluation.get(card.after))
        if after is not None:
            before = interval(run.evaluation.get(card.before)) if card.before else None
            lines.append((i, run.name, before, after))
    return lines


def card_html(card: Card, lines: list[Line], named: bool) -> str:
    """Return one card with its `lines` (number of the colour, name, before, after), the names shown if `named`."""
    intervals = [v for _, _, before, after in lines for v in (before, after) if v is not None]
    low = min(v.mean if v.low is None else v.low for v in intervals)
    high = max(v.mean if v.high is None else v.high for v in intervals)
    compared = len(lines) > 1 or lines[0][2] is not None
    rows = "".join(_line(line, low, high, compared, named) for line in lines)
    head = f'<h3>{escape(card.title)}</h3><p class="unit">{escape(card.unit)}</p>'
    return f'<article class="card">{head}{rows}</article>'


def _line(line: Line, low: float, high: float, compared: bool, named: bool) -> str:
    run, name, before, after = line
    size = max(abs(low), abs(high))
    was = "" if before is None else f'<span class="was">{number(before.mean, beside=size)}</span>'
    arrow = "" if before is None else f'<span class="arrow">{ARROW}</span>'
    spans = [text for v in (before, after) if v is not None and (text := span(v, size))]
    note = f'<p class="interval">{ARROW.join(spans)}</p>' if spans else ""
    track = _track(before, after, low, high) if compared and high > low else ""
    title = f'<p class="run-name"><i class="dot"></i>{escape(name)}</p>' if named else ""
    return (
        f'<div class="line run-{run}">{title}'
        f'<p class="figure">{was}{arrow}<strong>{number(after.mean, beside=size)}</strong></p>{note}{track}</div>'
    )


def _track(before: Interval | None, after: Interval, low: float, high: float) -> str:
    # A margin of 6% at either end, so that no marker is on the edge.
    def place(value: float) -> float:
        return 6 + 88 * (value - low) / (high - low)

    parts = []
    for kind, value in (("before", before), ("after", after)):
        if value is None:
            continue
        if value.low is not None and value.high is not None:
            left, right = place(value.low), place(value.high)
            parts.append(f'<i class="whisker {kind}" style="left:{left:.2f}%;width:{right - left:.2f}%"></i>')
        parts.append(f'<i class="mark {kind}" style="left:{place(value.mean):.2f}%"></i>')
    return f'<div class="track" aria-hidden="true">{"".join(parts)}</div>'
