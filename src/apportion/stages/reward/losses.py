"""Losses of a reward model: cross-entropy of labelled excerpts, Bradley–Terry of pairs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, softplus

from apportion.stages.reward.excerpts import Excerpt, ExcerptPair


def reward_of(logits: Tensor) -> Tensor:
    """Return R (N,) = logit(positive) − logit(negative) of 2-class logits (N,2)."""
    return logits[:, 1] - logits[:, 0]


def summed_loss(logits: Tensor, labels: Tensor, excerpts: Sequence[Excerpt | ExcerptPair]) -> tuple[Tensor, Tensor]:
    """Return (loss in nats, how many are judged right), both summed over `excerpts`.

    Of pairs the loss is −log σ(R(chosen) − R(rejected)) (Bradley and Terry 1952, as in Ouyang et al. 2022,
    arXiv 2203.02155), and one is judged right where its chosen excerpt has the higher score. It says nothing about the
    level of R: the mean stored beside the model does.

    Args:
        logits: (N,2) float32 of `flat(excerpts)`. labels: (N,) int64, their classes.
    """
    if not isinstance(excerpts[0], ExcerptPair):
        return cross_entropy(logits, labels, reduction="sum"), (logits.argmax(dim=1) == labels).sum()
    chosen, rejected = reward_of(logits).chunk(2)
    margin = chosen - rejected
    return softplus(-margin).sum(), (margin > 0).sum()


def decisions(scores: Tensor, excerpts: Sequence[Excerpt | ExcerptPair]) -> tuple[Tensor, list[int]]:
    """Return (what σ makes the probability of the second class of, that class) of each excerpt or pair.

    Of excerpts these are R and the label. Of pairs they are R(chosen) − R(rejected) and 1.

    Args:
        scores: R (N,) of `flat(excerpts)`.
    """
    if excerpts and isinstance(excerpts[0], ExcerptPair):
        chosen, rejected = scores.chunk(2)
        return chosen - rejected, [1] * len(excerpts)
    return scores, [one.label for one in excerpts if isinstance(one, Excerpt)]


def both_orders(margins: Tensor, truth: Sequence[int], paired: bool) -> tuple[Tensor, list[int]]:
    """Return decisions with those of each pair in the other order added, so that both classes occur."""
    if not paired:
        return margins, list(truth)
    return torch.cat([margins, -margins]), [*truth, *(1 - one for one in truth)]
