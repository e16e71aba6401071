"""Losses of a reward model: cross-entropy of labelled excerpts, Bradley–Terry of pairs, and those of rankings."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, softplus

from apportion.config import PreferenceConfig
from apportion.stages.reward.excerpts import Excerpt, ExcerptPair, RankedExcerpts
from apportion.stages.reward.ranked import pair_rows, summed_centring, summed_ranking_loss


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


class MeanLoss:
    """The loss of a whole batch, a part of it at a time: divided by what the whole batch has to divide it by.

    Args:
        batch: all excerpts, pairs or rankings of the batch.
    """

    def __init__(self, batch: Sequence[Excerpt | ExcerptPair | RankedExcerpts], preferences: PreferenceConfig) -> None:
        self.preferences, self.size = preferences, len(batch)
        self.weight, self.pairs = float(self.size), self.size
        if ranked := _ranked(batch):
            completions = sum(len(unit.completions) for unit in ranked)
            self.weight = float(summed_ranking_loss(torch.zeros(completions), ranked, preferences)[1])
            self.pairs = sum(len(unit.pairs) for unit in ranked)

    def __call__(
        self, logits: Tensor, labels: Tensor, part: Sequence[Excerpt | ExcerptPair | RankedExcerpts]
    ) -> tuple[Tensor, Tensor]:
        """Return the share of `part` in (mean loss in nats, share judged right) of the batch.

        Args:
            logits: (N, 1 or 2) float32 of `flat(part)`. labels: (N,) int64, the classes of excerpts and pairs.
        """
        ranked = _ranked(part)
        if not ranked:
            singles = [one for one in part if not isinstance(one, RankedExcerpts)]
            loss, right = summed_loss(logits, labels, singles)
            return loss / self.size, right / self.size
        scores = logits[:, 0]
        loss = summed_ranking_loss(scores, ranked, self.preferences)[0] / self.weight
        if self.preferences.center_coef:
            loss = loss + self.preferences.center_coef * summed_centring(scores, ranked) / self.size
        winners, losers = pair_rows(ranked)
        return loss, (scores[winners] > scores[losers]).sum() / max(1, self.pairs)


def _ranked(batch: Sequence[Excerpt | ExcerptPair | RankedExcerpts]) -> list[RankedExcerpts]:
    return [one for one in batch if isinstance(one, RankedExcerpts)]


def micro_batches(batch: Sequence[Excerpt | ExcerptPair | RankedExcerpts], mine: Tensor, most: int) -> list[Tensor]:
    """Return the rows `mine` (n,) of a batch by at most `most` excerpts or pairs.

    Of rankings, a part has at most so many completions, or those of one prompt: they stay together.
    """
    parts: list[list[int]] = []
    room = 0
    for row in mine.tolist():
        one = batch[row]
        size = len(one.completions) if isinstance(one, RankedExcerpts) else 1
        if size > room:
            parts.append([])
            room = most
        parts[-1].append(row)
        room -= size
    return [torch.tensor(part, dtype=torch.int64) for part in parts]


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
