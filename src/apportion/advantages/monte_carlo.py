"""Monte-Carlo returns: each action gets its reward-to-go; no critic."""

from __future__ import annotations

from torch import Tensor

from apportion.advantages._actions import action_rewards, to_go
from apportion.errors import check_fraction
from apportion.masking import spread
from apportion.types import Advantages, Estimator, Rollouts


def monte_carlo(gamma: float = 1.0) -> Estimator:
    """Return A_k = G_k = R_k + γ·G_{k+1}, the reward-to-go of each action, on each of its tokens.

    R_k is the sum of the action's token rewards, γ in [0, 1] counts per action. There is no baseline and no critic;
    whitening in the update (`ppo.whiten_advantages`, off by default) would centre the batch. A truncated response
    has the rewards up to its truncation. The returns are the same G_k. With γ = 1 and the score on the last token
    every token gets the score; GAE(γ, λ=1) with V = 0.

    Raises:
        ConfigError: γ outside [0, 1].

    Source: Williams 1992; Sutton and Barto 2018, section 13.3.

    Assumes: nothing.
    Use it for: the simplest unbiased estimate, and a baseline for the others.
    """
    return _MonteCarlo(check_fraction("monte_carlo.gamma", gamma, "1 is usual for text."))


class _MonteCarlo:
    needs: frozenset[str] = frozenset()
    uses_share = False
    group_wise = False
    critic = False

    def __init__(self, gamma: float) -> None:
        self.gamma = gamma

    def __call__(self, rewards: Tensor, segments: Tensor, rollouts: Rollouts) -> Advantages:
        returns = spread(to_go(action_rewards(rewards, segments), self.gamma), segments)
        return Advantages(returns, returns.clone())
