"""GRPO's advantage: a rollout's total relative to those of the same prompt."""

from __future__ import annotations

import torch
from torch import Tensor

from apportion.advantages._groups import EPSILON, Stats, check_credit, compare, deviation, group_stats, on_tokens
from apportion.advantages._weights import SHARE
from apportion.errors import check_flag
from apportion.types import Advantages, Estimator, Rollouts


def group_relative(std: bool = True, credit_mix: float = 0.0, cap: float | None = 3.0) -> Estimator:
    """Return A_i = (R_i − mean) / (std + 1e-4) over the rollouts of one prompt, R = Σr, on every token of the row.

    Args:
        std: divide by the group's standard deviation (n−1); False is Dr. GRPO's.
        credit_mix: β in [0, 1]: token t gets A·((1−β) + β·n·share_t), n the row's tokens: mean 1 over the row. Above 0
            it needs evidence "credit_share" (B,T), the share of the credit in use. **Biased**: a weight that depends on
            later tokens no longer lets the group's baseline cancel. Monitor entropy and length.
        cap: the largest such weight, >= 1, the rest scaled up to keep the mean (see `credit_weights`); None is no cap.

    Groups are `rollouts.group`, in any order and of any size; rows without tokens are in none. A group of one, or one
    whose totals are equal up to rounding (1e-6 of the largest), has advantage 0: both are counted by `stats`. The
    returns are Σr. The estimate treats the rollout as one action; segments only mark its tokens.

    Raises:
        ConfigError: a setting outside its range. DataError: "credit_share" absent, negative or not finite.

    Sources: Shao et al. 2024 (arXiv 2402.03300) section 4.1; Liu et al. 2025 (arXiv 2503.20783) without std.

    Assumes: samples of one prompt are comparable.
    Use it when several samples a prompt are cheap and a critic is not wanted.
    """
    check_flag("group_relative.std", std, "GRPO is true, Dr. GRPO false.")
    check_credit("group_relative", credit_mix, cap)
    return _GroupRelative(std, float(credit_mix), cap)


class _GroupRelative:
    group_wise = True
    scalar = True  # it uses only the sum of each row's rewards, not where they land
    critic = False

    def __init__(self, std: bool, mix: float, cap: float | None) -> None:
        self.std, self.mix, self.cap = std, mix, cap
        self.uses_share = mix > 0.0
        self.needs: frozenset[str] = frozenset({SHARE} if self.uses_share else ())

    def __call__(self, rewards: Tensor, segments: Tensor, rollouts: Rollouts) -> Advantages:
        groups = compare(rewards, segments, rollouts)
        advantages = groups.deviations()
        if self.std:
            peak, spread = deviation(groups, advantages)
            safe = torch.where(peak > 0, peak, 1.0)
            advantages = (advantages / safe[groups.member]) / (spread + EPSILON / safe)[groups.member]
        return on_tokens(advantages, groups, segments, rollouts, self.mix, self.cap)

    def stats(self, rewards: Tensor, segments: Tensor, rollouts: Rollouts) -> Stats:
        """Return (sum, count) of groups without a gradient and of weights at the cap."""
        return group_stats(compare(rewards, segments, rollouts), segments, rollouts, self.mix, self.cap)
