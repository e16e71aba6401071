"""Preference pairs of a ranking of several completions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations
from typing import Any, Literal, NamedTuple, TypeVar

T = TypeVar("T")
Which = Literal["all", "best_worst"]


class RankedPair(NamedTuple):
    """A prompt and two of its completions, the first ranked above the second."""

    prompt: Any
    chosen: Any
    rejected: Any


def pairs_of_rankings(
    prompt: Any, completions: Sequence[Any], ranks: Sequence[float | None], which: Which = "all"
) -> list[RankedPair]:
    """Return the pairs that a ranking of K completions of one prompt says something about.

    Args:
        prompt, completions: texts or messages, handed on as they are.
        ranks: K numbers, 1 is best; equal ones are ties, which give no pair; None for a completion that was not judged.
        which: "all" pairs, K·(K−1)/2 of them without ties, the best completion's first (Ouyang et al. 2022,
            arXiv 2203.02155); or "best_worst", the first of the best against the first of the worst: at most one.

    Raises:
        ValueError: as many ranks as completions are not there, or a rank is no finite number.
    """
    if len(ranks) != len(completions):
        raise ValueError(f"{len(ranks)} ranks of {len(completions)} completions")
    for rank in ranks:
        number = isinstance(rank, int | float) and not isinstance(rank, bool) and math.isfinite(rank)
        if rank is not None and not number:
            raise ValueError(f"a rank {rank!r}")
    return [RankedPair(prompt, completions[one], completions[other]) for one, other in ranked_pairs(ranks, which)]


def ranked_pairs(ranks: Sequence[float | None], which: Which = "all") -> list[tuple[int, int]]:
    """Return (winner, loser), places in `ranks`, of the pairs that K ranks say something about, the best winner first.

    Args:
        ranks, which: as `pairs_of_rankings`.
    """
    judged = [(rank, place) for place, rank in enumerate(ranks) if rank is not None]
    ordered = sorted(judged, key=lambda item: item[0])  # stable: ties keep their order
    pairs = list(combinations(ordered, 2))
    if which == "best_worst" and ordered:
        worst = next(item for item in ordered if item[0] == ordered[-1][0])
        pairs = [(ordered[0], worst)]
    return [(one[1], other[1]) for one, other in pairs if one[0] < other[0]]
