"""RLOO's advantage: a rollout's total minus the mean of the others of the same prompt."""

from __future__ import annotations

from torch import Tensor

from apportion.advantages._groups import Stats, check_credit, compare, group_stats, on_tokens
from apportion.advantages._weights import SHARE
from apportion.types import Advantages, Estimator, Rollouts


def leave_one_out(credit_mix: float = 0.0, cap: float | None = 3.0) -> Estimator:
    """Return A_i = R_i − mean_{j≠i} R_j over the rollouts of one prompt, R = Σr, on every token of the row.

    The baseline is independent of the rollout, so it adds no bias. With two rollouts A is their difference.

    Args:
        credit_mix: β in [0, 1], weights by the credit's share as in `group_relative`; above 0 it needs evidence
            "credit_share" (B,T) and is biased.
        cap: the largest such weight, >= 1; None is no cap.

    A group of one, or one whose totals are equal up to rounding, has advantage 0 and is counted by `stats`. Rows
    without tokens are in no group. The returns are Σr.

    Raises:
        ConfigError: a setting outside its range. DataError: "credit_share" absent, negative or not finite.

    Source: Kool et al. 2019; Ahmadian et al. 2024 (arXiv 2402.14740) eq. 7 for language models.

    Assumes: samples of one prompt are comparable.
    Use it when an unbiased gradient without a critic is wanted, with two samples a prompt or more.
    """
    check_credit("leave_one_out", credit_mix, cap)
    return _LeaveOneOut(float(credit_mix), cap)


class _LeaveOneOut:
    group_wise = True
    scalar = True  # it uses only the sum of each row's rewards, not where they land
    critic = False

    def __init__(self, mix: float, cap: float | None) -> None:
        self.mix, self.cap = mix, cap
        self.uses_share = mix > 0.0
        self.needs: frozenset[str] = frozenset({SHARE} if self.uses_share else ())

    def __call__(self, rewards: Tensor, segments: Tensor, rollouts: Rollouts) -> Advantages:
        groups = compare(rewards, segments, rollouts)
        size = groups.size[groups.member]
        # R_i − (Σ − R_i)/(n−1) = (R_i − mean)·n/(n−1), without taking the difference of two large sums
        advantages = groups.deviations() * (size / (size - 1).clamp_min(1))
        return on_tokens(advantages, groups, segments, rollouts, self.mix, self.cap)

    def stats(self, rewards: Tensor, segments: Tensor, rollouts: Rollouts) -> Stats:
        """Return (sum, count) of groups without a gradient and of weights at the cap."""
        return group_stats(compare(rewards, segments, rollouts), segments, rollouts, self.mix, self.cap)
