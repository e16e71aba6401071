"""REINFORCE: advantage times log-probability, without a ratio."""

from __future__ import annotations

import torch
from torch import Tensor

from apportion.losses._ratios import Sums, log_ratios, statistics, tokens, upcast
from apportion.types import PolicyLoss, Rollouts


def reinforce() -> PolicyLoss:
    """Return REINFORCE's loss, −A·log π a token.

    The exact policy gradient on the batch's first step; later steps are off-policy without a correction, so take
    one step a batch, or use `ppo`. RLOO as its authors write it is `leave_one_out` with this loss; RLOO with a clipped
    sequence ratio, as some libraries train it, is `ppo(ratio="action")` over `whole_response`.

    Denominator: tokens, a constant of the whole batch, as the number of sequences is: the direction is that of the mean
    over sequences of Σ_t A_t·∇log π_t, at the scale of the other token losses.

    Sources: Williams 1992; Ahmadian et al. 2024 (arXiv 2402.14740) for RLOO.

    Assumes: the batch was sampled by the current policy.
    Use it for: one step a batch.
    """

    def terms(
        logprobs: Tensor, rollouts: Rollouts, advantages: Tensor, mask: Tensor, segments: Tensor
    ) -> tuple[Tensor, Sums]:
        log_ratio = log_ratios(logprobs, rollouts.old_logprobs, mask)
        logprobs, advantages = (torch.where(mask, upcast(x), 0.0) for x in (logprobs, advantages))
        return -(advantages * logprobs).sum(), statistics(log_ratio, log_ratio, torch.zeros_like(mask), mask)

    return PolicyLoss(terms, tokens, "token")
