"""Bradley–Terry on rankings: every pair of a prompt's ranking, with each completion scored once."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import logsigmoid

from apportion.losses._rankings import decided, pair_shares, pairs_by_prompt, rankings


def bradley_terry(
    scores: Tensor,
    groups: Tensor,
    ranks: Tensor,
    *,
    margins: Tensor | None = None,
    ties: str = "skip",
    weight: str = "prompt",
) -> tuple[Tensor, Tensor]:
    """Return (sum (), count ()) of −log σ(s_w − s_l − (m_w − m_l)) over the pairs of each prompt's ranking, nats.

    Divide the sum by the count. Both are float32, or float64 where the scores are; the count has no gradient. A prompt
    of K completions has up to K·(K−1)/2 pairs, and each completion's score is an argument once, so that a reward model
    computes K forwards and not K·(K−1).

    Args:
        scores: (N,) rewards of the completions.
        groups: (N,) int64, the same number for the completions of one prompt, in any order.
        ranks: (N,), 1 is best and equal ranks are ties; NaN is "cannot judge", and takes no part.
        margins: (N,) a value a completion; a pair's margin is the winner's less the loser's. None is 0.
        ties: "skip": two equal ranks are no pair. "half": they are one pair, half won by either.
        weight: "prompt": the pairs of a prompt are averaged, and the count is the number of prompts that have a pair.
            "pair": all pairs weigh the same, and the count is their number.

    Without any pair both are 0, and so is the gradient.

    Raises:
        ConfigError: `ties` or `weight` is no such name.
        DataError: shapes differ, groups are no whole numbers, a judged completion's margin is not finite.

    Sources: Bradley and Terry 1952; Ouyang et al. 2022 (arXiv 2203.02155) eq. 1, whose average over a prompt's pairs
    is `weight="prompt"`; margins as in Touvron et al. 2023 (arXiv 2307.09288) eq. 2.

    Assumes: one number a completion explains how often it beats any other.
    Use it for: reward models on pairs and on rankings; the default.
    """
    given = rankings(scores, groups, ranks, margins, ties, weight)
    chosen = decided(given, ties).nonzero()[:, 0]
    winner, loser, shares = given.first[chosen], given.second[chosen], pair_shares(given, chosen)
    losses = -logsigmoid(given.scores[winner] - given.scores[loser]) * shares
    if weight == "pair":
        return losses.sum(), shares.sum()
    pairs = pairs_by_prompt(given, chosen, shares)
    return (losses / pairs[given.prompt[winner]]).sum(), (pairs > 0).sum().to(pairs.dtype)
