"""Ranked completions as excerpts: each once, whole, with every ranking of them; their pairs and their loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from apportion import losses
from apportion.config import PreferenceConfig
from apportion.stages.reward.excerpts import RankedExcerpts


def merged(units: Sequence[RankedExcerpts]) -> list[RankedExcerpts]:
    """Return the units with those of equal completions joined, so that each completion is computed once."""
    found: dict[tuple[tuple[int, ...], ...], RankedExcerpts] = {}
    for one in units:
        key = tuple(tuple(excerpt.ids) for excerpt in one.completions)
        first = found.get(key)
        if first is not None:
            one = first._replace(ranks=[*first.ranks, *one.ranks], margins=[*first.margins, *one.margins])
        found[key] = one
    return list(found.values())


class Comparisons(NamedTuple):
    """The rankings of a batch of M ranked completions; one that is in several rankings is there several times.

    Attributes:
        rows: (M,) int64, among all completions of the batch. groups: (M,) int64, a number a ranking.
        ranks, margins: (M,) float32.
    """

    rows: Tensor
    groups: Tensor
    ranks: Tensor
    margins: Tensor


def comparisons(batch: Sequence[RankedExcerpts], device: torch.device) -> Comparisons:
    """Return the rankings of a batch, whose completions follow one another as `excerpts.flat` gives them."""
    rows, groups, ranks, margins = list[int](), list[int](), list[float](), list[float]()
    start = ranking = 0
    for unit in batch:
        count = len(unit.completions)
        for given, values in zip(unit.ranks, unit.margins, strict=True):
            rows += range(start, start + count)
            groups += [ranking] * count
            ranks += given
            margins += values
            ranking += 1
        start += count
    whole = (torch.tensor(values, dtype=torch.int64, device=device) for values in (rows, groups))
    return Comparisons(*whole, *(torch.tensor(values, device=device) for values in (ranks, margins)))


def summed_ranking_loss(
    scores: Tensor, batch: Sequence[RankedExcerpts], config: PreferenceConfig
) -> tuple[Tensor, Tensor]:
    """Return (sum, count) of `losses.bradley_terry` or `plackett_luce` over the rankings of a batch.

    Args:
        scores: (N,) R of all completions of the batch in turn, each once.
    """
    given = comparisons(batch, scores.device)
    margins = given.margins if config.margins else None
    settings: Mapping[str, str] = {"ties": config.ties, "weight": config.weight}
    loss = losses.PREFERENCES[config.loss]
    return loss(scores[given.rows], given.groups, given.ranks, margins=margins, **settings)


def summed_centring(scores: Tensor, batch: Sequence[RankedExcerpts]) -> Tensor:
    """Return Σ (2·mean R of a prompt's completions)², of two (R_chosen + R_rejected)² as TRL's RewardTrainer has it.

    Source: Eisenstein et al. 2023 (arXiv 2312.09244) eq. 4.
    """
    parts = scores.split([len(unit.completions) for unit in batch])
    return torch.stack([(2 * part.mean()) ** 2 for part in parts]).sum()


def pair_rows(batch: Sequence[RankedExcerpts]) -> tuple[list[int], list[int]]:
    """Return (winners, losers) of all pairs of a batch, as rows of all its completions."""
    winners, losers, start = list[int](), list[int](), 0
    for unit in batch:
        for winner, loser in unit.pairs:
            winners.append(start + winner)
            losers.append(start + loser)
        start += len(unit.completions)
    return winners, losers
