"""CISPO: a clipped and detached importance weight, so that every token keeps its gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from apportion.losses._ratios import Sums, check_clip, limited_exp, log_ratios, statistics, tokens, upcast
from apportion.types import PolicyLoss, Rollouts


def cispo(clip_low: float = 1.0, clip_high: float = 4.0) -> PolicyLoss:
    """Return CISPO's loss, −sg[clip(ρ, 1−ε_low, 1+ε_high)]·A·log π a token, over all tokens of the batch, without KL.

    PPO drops the gradient of a token whose ratio is outside the clip range; CISPO only bounds its weight.

    Args:
        clip_low: ε_low in [0, 1]. The paper sets no lower bound, which is 1 here.
        clip_high: ε_high >= 0, the bound being 1 + ε_high. MiniMax-M1 does not give its value; 4 is the bound of 5 that
            ScaleRL (arXiv 2510.13786) used.

    Denominator: tokens. Source: MiniMax 2025 (MiniMax-M1, arXiv 2506.13585) eq. 4–5.

    Raises:
        ConfigError: a bound outside its range.

    Assumes: the gradient of a rare token is useful even after its ratio has moved.
    Use it when few tokens are decisive and PPO's clip removes their gradient.
    """
    check_clip("cispo.clip_low", clip_low, 1.0)
    check_clip("cispo.clip_high", clip_high)

    def terms(
        logprobs: Tensor, rollouts: Rollouts, advantages: Tensor, mask: Tensor, segments: Tensor
    ) -> tuple[Tensor, Sums]:
        log_ratio = log_ratios(logprobs, rollouts.old_logprobs, mask)
        ratio = limited_exp(log_ratio).detach()
        weight = ratio.clamp(1.0 - clip_low, 1.0 + clip_high)
        logprobs, advantages = (torch.where(mask, upcast(x), 0.0) for x in (logprobs, advantages))
        loss = -(weight * advantages * logprobs).sum()
        return loss, statistics(log_ratio, log_ratio, weight != ratio, mask)

    return PolicyLoss(terms, tokens, "token")
