"""Plackett–Luce on rankings: the likelihood of the whole order, chosen from the best to the worst."""

from __future__ import annotations

import torch
from torch import Tensor

from apportion.losses._rankings import Rankings, decided, pair_shares, pairs_by_prompt, rankings


def plackett_luce(
    scores: Tensor,
    groups: Tensor,
    ranks: Tensor,
    *,
    margins: Tensor | None = None,
    ties: str = "skip",
    weight: str = "prompt",
) -> tuple[Tensor, Tensor]:
    """Return (sum (), count ()) of the negative log-likelihood of each prompt's ranking, nats.

    A ranking is a sequence of choices: the best of all, then the best of the rest. With scores less their margins,

        L = Σ_i log Σ_{j = i or ranked below i} exp(s_j − s_i).

    Divide the sum by the count. Both are float32, or float64 where the scores are; the count has no gradient. Of two
    completions this is `bradley_terry`, with every setting.

    Args:
        scores: (N,) rewards of the completions.
        groups: (N,) int64, the same number for the completions of one prompt, in any order.
        ranks: (N,), 1 is best and equal ranks are ties; NaN is "cannot judge", and takes no part.
        margins: (N,) a value a completion, subtracted from its score. None is 0.
        ties: "skip": completions of one rank do not compete with one another. "half": each of them is chosen half the
            time before all others of its rank, half the time after them; of two this is the mean over both orders.
        weight: "prompt": every prompt counts 1, and the count is the number of prompts that have a pair. "pair": a
            prompt counts its pairs, and the count is their number.

    Without any pair both are 0, and so is the gradient.

    Raises:
        ConfigError: `ties` or `weight` is no such name.
        DataError: shapes differ, groups are no whole numbers, a judged completion's margin is not finite.

    Sources: Plackett 1975; Luce 1959; as a ranking loss Xia et al. 2008 (ListMLE).

    Assumes: people choose the best first, and then among the rest as if the best had never been there.
    Use it when whole orders of many completions were given, the top of which should count most.
    """
    given = rankings(scores, groups, ranks, margins, ties, weight)
    chosen = decided(given, ties).nonzero()[:, 0]
    below = given.ranks[given.first] < given.ranks[given.second]
    losses = _choices(given, below)  # (M,)
    if ties == "half":
        level = given.ranks[given.first] == given.ranks[given.second]
        losses = 0.5 * (losses + _choices(given, below | level))
    pairs = pairs_by_prompt(given, chosen, pair_shares(given, chosen))
    totals = losses.new_zeros(given.prompts).index_add(0, given.prompt, losses)
    if weight == "pair":
        return (totals * pairs).sum(), pairs.sum()
    return totals.sum(), (pairs > 0).sum().to(pairs.dtype)


def _choices(given: Rankings, rivals: Tensor) -> Tensor:
    """Return −log of the probability (M,) of choosing each row among itself and its `rivals` (Q,) bool."""
    among = (rivals | (given.first == given.second)).nonzero()[:, 0]
    first, gaps = given.first[among], given.scores[given.second[among]] - given.scores[given.first[among]]
    zeros = torch.zeros_like(given.scores)  # a row is its own rival, so that the largest gap is at least 0
    largest = zeros.scatter_reduce(0, first, gaps.detach(), "amax")
    return zeros.index_add(0, first, (gaps - largest[first]).exp()).log() + largest
