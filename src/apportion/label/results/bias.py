"""Biases of rankings: towards a position on the page, and towards long answers."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

from apportion.intervals import Interval, mean_interval
from apportion.label.results.agreement import kendall_tau
from apportion.label.store.reading import Ranking


class PositionBias(NamedTuple):
    """How often the answer at a position of the page was the best, beside the share that chance gives it.

    Attributes:
        position: 1 is the first on the page. share: {mean, low, high}; a tie for the best counts 1/m for each of m.
        chance: the mean of 1/K over the same rankings. rankings: their number.
    """

    position: int
    share: Interval
    chance: float
    rankings: int


def position_bias(rankings: Sequence[Ranking]) -> list[PositionBias]:
    """Return the bias of each position, over rankings whose answers were all judged."""
    wins: dict[int, list[float]] = defaultdict(list)
    chances: dict[int, list[float]] = defaultdict(list)
    for one in rankings:
        if one.ranks is None or None in one.ranks:
            continue
        best = [i for i, rank in enumerate(one.ranks) if rank == 1]
        for position, index in enumerate(one.shown, 1):
            wins[position].append(1 / len(best) if index in best else 0.0)
            chances[position].append(1 / len(one.ranks))
    return [
        PositionBias(p, _within(mean_interval(wins[p])), sum(chances[p]) / len(chances[p]), len(wins[p]))
        for p in sorted(wins)
    ]


def first_place_excess(rankings: Sequence[Ranking]) -> float | None:
    """Return how much more often than by chance the answer shown first was the best; None without rankings."""
    first = next(iter(position_bias(rankings)), None)
    return None if first is None else first.share["mean"] - first.chance


def length_bias(rankings: Sequence[Ranking]) -> Interval | None:
    """Return {mean, low, high} of Kendall's tau between the length of an answer (characters) and its place, over the
    rankings: 1 where longer was always better; None where it is not defined."""
    values = []
    for one in rankings:
        if one.ranks is None:
            continue
        lengths = [length(text) for text in one.completions]
        tau = kendall_tau(lengths, [None if rank is None else -rank for rank in one.ranks])
        if tau is not None:
            values.append(tau)
    return mean_interval(values) if values else None


def length(text: Any) -> int:
    """Return the characters of an answer, a text or messages."""
    return len(text) if isinstance(text, str) else len(json.dumps(text, ensure_ascii=False))


def _within(value: Interval) -> Interval:
    return {"mean": value["mean"], "low": max(0.0, value["low"]), "high": min(1.0, value["high"])}
