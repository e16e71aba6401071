"""How alike the answers of one policy are: the mean cosine similarity of their token bigrams."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

Bigrams = dict[tuple[int, int], float]


def self_similarity(answers: Sequence[Sequence[Sequence[int]]]) -> tuple[float | None, float | None]:
    """Return the mean cosine similarity of the bigram counts of two answers (to different prompts, to one prompt).

    Args:
        answers: token ids, by prompt and answer.

    1 is the same text everywhere, 0 no bigram in common. An answer without a bigram is like none. None where there are
    no such pairs. It takes time linear in the tokens: Σ_{i≠j} uᵢ·uⱼ = ‖Σᵢ uᵢ‖² − Σᵢ ‖uᵢ‖².
    """
    total: Counter[tuple[int, int]] = Counter()
    inside = own = 0.0
    rows = pairs_inside = 0
    for group in answers:
        units = [unit_bigrams(row) for row in group]
        summed: Counter[tuple[int, int]] = Counter()
        for unit in units:
            summed.update(unit)
        alone = float(sum(bool(unit) for unit in units))
        inside += _square(summed) - alone
        own += alone
        pairs_inside += len(units) * (len(units) - 1)
        rows += len(units)
        total.update(summed)
    between = _square(total) - own - inside
    pairs_between = rows * (rows - 1) - pairs_inside
    return _share(between, pairs_between), _share(inside, pairs_inside)


def unit_bigrams(row: Sequence[int]) -> Bigrams:
    """Return the counts of a row's bigrams over their norm; empty for fewer than two tokens."""
    counts = Counter(pairwise(row))
    norm = math.sqrt(sum(n * n for n in counts.values()))
    return {pair: n / norm for pair, n in counts.items()}


def _square(vector: Counter[tuple[int, int]]) -> float:
    return math.fsum(value * value for value in vector.values())


def _share(total: float, pairs: int) -> float | None:
    return min(1.0, max(0.0, total / pairs)) if pairs else None
