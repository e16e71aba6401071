"""REINFORCE++: reward-to-go, optionally minus the group's mean, whitened over the whole batch."""

from __future__ import annotations

import torch
from torch import Tensor

from apportion.advantages._actions import action_rewards, last_actions, to_go
from apportion.advantages._groups import Stats, compare, group_stats
from apportion.errors import ConfigError, check_fraction
from apportion.masking import spread
from apportion.types import Advantages, Estimator, Rollouts


def reinforce_pp(baseline: str | None = None, gamma: float = 1.0) -> Estimator:
    """Return A_k = G_k, the reward-to-go of each action, raw: REINFORCE++'s normalisation over the whole batch is the
    update's whitening, which must be on.

    Args:
        baseline: None, for any number of rollouts a prompt; or "group", REINFORCE++ with baseline: the mean of Σr over
            the prompt's rollouts is first subtracted from the reward of each row's last action. The rollout itself is
            in that mean, so a group of one is left with Σr = 0; `stats` counts them.
        gamma: γ in [0, 1], per action.

    The KL penalty belongs in the rewards (credit `kl_penalty`), token by token, so G includes future penalties. Rows
    without tokens are in no group. The returns are G before the baseline.

    Raises:
        ConfigError: a setting outside its range.

    Source: Hu et al. 2025 (arXiv 2501.03262).

    Assumes: returns of different prompts are on the same scale.
    Use it for: one sample a prompt and no critic; whitening must be on.
    """
    if baseline not in (None, "group"):
        fix = "Use group with several samples a prompt."
        raise ConfigError("reinforce_pp.baseline", baseline, "null or 'group'", fix)
    return _ReinforcePP(baseline, check_fraction("reinforce_pp.gamma", gamma, "1 is usual for text."))


class _ReinforcePP:
    needs: frozenset[str] = frozenset()
    uses_share = False
    whitened = True  # its normalisation over the batch is the update's
    critic = False

    def __init__(self, baseline: str | None, gamma: float) -> None:
        self.baseline, self.gamma = baseline, gamma
        self.group_wise = baseline == "group"

    def __call__(self, rewards: Tensor, segments: Tensor, rollouts: Rollouts) -> Advantages:
        own = action_rewards(rewards, segments)
        returns = to_go(own, self.gamma)
        advantages = returns
        if self.baseline == "group":
            ends = torch.arange(own.shape[1], device=own.device) == last_actions(segments)[:, None]
            mean = compare(rewards, segments, rollouts).means()[:, None]
            advantages = to_go(torch.where(ends, own - mean, own), self.gamma)
        return Advantages(spread(advantages, segments), spread(returns, segments))

    def stats(self, rewards: Tensor, segments: Tensor, rollouts: Rollouts) -> Stats:
        """Return (sum, count) of groups of one and of groups with equal totals."""
        if not self.group_wise:
            return {}
        return group_stats(compare(rewards, segments, rollouts), segments, rollouts, 0.0, None)
