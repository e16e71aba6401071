"""Shared parts of group methods: statistics of the totals of one prompt's rollouts, and advantages on tokens."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from apportion.advantages._weights import credit_weights, share_of
from apportion.errors import ConfigError, check_fraction
from apportion.types import Advantages, Rollouts

ROUNDING = 1e-6  # totals of one group that differ by less, relative to the largest, are equal: redistribution rounds
EPSILON = 1e-4  # added to the standard deviation

Stats = dict[str, tuple[Tensor, Tensor]]


class Groups(NamedTuple):
    """The totals of a batch and the statistics of their groups.

    Attributes:
        totals: (B,) float32, Σr of each rollout.
        full: (B,) bool, rollouts with a token; the others are in no group.
        member: (B,) int64, the group of each rollout, 0..G−1. size: (G,) its rollouts with a token.
        low: (G,) the smallest total. mean: (G,) the mean *above* `low`: exactly 0 where all totals are equal.
        flat: (G,) bool, totals equal up to rounding.
    """

    totals: Tensor
    full: Tensor
    member: Tensor
    size: Tensor
    low: Tensor
    mean: Tensor
    flat: Tensor

    def deviations(self) -> Tensor:
        """Return R − mean of the group, (B,); exactly 0 in a flat group and for a rollout without tokens."""
        apart = (self.totals - self.low[self.member]) - self.mean[self.member]
        return torch.where(self.full & ~self.flat[self.member], apart, 0.0)

    def means(self) -> Tensor:
        """Return the mean total of each rollout's group, (B,); 0 for a rollout without tokens."""
        return torch.where(self.full, self.low[self.member] + self.mean[self.member], 0.0)


def compare(rewards: Tensor, segments: Tensor, rollouts: Rollouts) -> Groups:
    """Return the totals Σr of rewards (B,T) over each row's tokens and their statistics by `rollouts.group`.

    Groups may come in any order and size. Rows without tokens enter no statistic.
    """
    on = segments >= 0
    totals = torch.where(on, rewards.float(), 0.0).sum(dim=1)
    full = on.any(dim=1)
    distinct, member = torch.unique(rollouts.group, return_inverse=True)
    size = totals.new_zeros(len(distinct)).index_add(0, member, full.float())

    def extreme(x: Tensor, how: str, empty: float) -> Tensor:
        start = totals.new_full((len(distinct),), empty)
        return start.scatter_reduce(0, member, torch.where(full, x, empty), how)

    # relative to the smallest: equal totals give exactly 0, and large similar ones keep their precision
    low = torch.where(size > 0, extreme(totals, "amin", torch.inf), 0.0)
    above = torch.where(full, totals - low[member], 0.0)
    mean = totals.new_zeros(len(distinct)).index_add(0, member, above / size[member].clamp_min(1))
    flat = extreme(above, "amax", 0.0) <= ROUNDING * extreme(totals.abs(), "amax", 0.0)
    return Groups(totals, full, member, size, low, mean, flat)


def deviation(groups: Groups, apart: Tensor) -> tuple[Tensor, Tensor]:
    """Return (largest |apart|, standard deviation ÷ that), each (G,), n−1 in the denominator.

    Divided by the largest before squaring, so that totals of 1e30 do not overflow.
    """
    zero = torch.zeros_like(groups.low)
    peak = zero.scatter_reduce(0, groups.member, apart.abs(), "amax")
    scaled = apart / torch.where(peak > 0, peak, 1.0)[groups.member]
    square = zero.index_add(0, groups.member, scaled**2)
    return peak, (square / (groups.size - 1).clamp_min(1)).sqrt()


def on_tokens(
    advantages: Tensor, groups: Groups, segments: Tensor, rollouts: Rollouts, mix: float, cap: float | None
) -> Advantages:
    """Return A (B,) on each row's tokens, weighted by the credit share where `mix` > 0; the returns are Σr.

    Raises:
        DataError: mix > 0 and evidence "credit_share" absent, negative or not finite.
    """
    on = segments >= 0
    spread = advantages[:, None].expand(on.shape)
    if mix > 0.0:
        spread = spread * credit_weights(share_of(rollouts, on)[0], on, mix, cap)[0]
    return Advantages(torch.where(on, spread, 0.0), torch.where(on, groups.totals[:, None], 0.0))


def group_stats(groups: Groups, segments: Tensor, rollouts: Rollouts, mix: float, cap: float | None) -> Stats:
    """Return the statistics of a group method as (sum, count) over groups, tokens and rows; they add over processes.

    "advantages/lone_rate": groups of one rollout, "advantages/flat_rate": groups of several with equal
    totals; neither gives a gradient. With credit: "advantages/capped_rate": tokens whose weight is at the cap, and
    "advantages/share_fallback_rate": rows whose share has no mass and became uniform.
    """
    count = (groups.size > 0).sum().float()
    stats: Stats = {
        "advantages/lone_rate": ((groups.size == 1).sum().float(), count),
        "advantages/flat_rate": ((groups.flat & (groups.size > 1)).sum().float(), count),
    }
    if mix > 0.0:
        on = segments >= 0
        share, fallback = share_of(rollouts, on)
        capped = credit_weights(share, on, mix, cap)[1]
        stats["advantages/capped_rate"] = (capped.sum().float(), on.sum().float())
        stats["advantages/share_fallback_rate"] = (fallback.sum().float(), groups.full.sum().float())
    return stats


def check_credit(field: str, credit_mix: float, cap: float | None) -> None:
    """Raise ConfigError for a `credit_mix` outside [0, 1] or a `cap` below 1, which a mean of 1 cannot satisfy."""
    check_fraction(f"{field}.credit_mix", credit_mix, "0 is the plain group method, 1 weights by the credit only.")
    number = isinstance(cap, (int, float)) and not isinstance(cap, bool)
    if cap is not None and not (number and 1.0 <= cap < float("inf")):
        fix = "3 is the default; null leaves the weights uncapped."
        raise ConfigError(f"{field}.cap", cap, "a number >= 1 or null", fix)
