"""GSPO: one length-normalised importance ratio a sequence, and its token form."""

from __future__ import annotations

import torch
from torch import Tensor

from apportion.losses._ratios import (
    Sums,
    check_clip,
    clipped_surrogate,
    limited_exp,
    log_ratios,
    row_mean,
    sequences,
    statistics,
    upcast,
)
from apportion.types import PolicyLoss, Rollouts


def gspo(clip_low: float = 3e-4, clip_high: float = 4e-4, token: bool = False) -> PolicyLoss:
    """Return GSPO's loss, max(−A·s, −A·clip(s, 1−ε_low, 1+ε_high)), s = (π(y)/π_old(y))^(1/|y|), one term a sequence.

    Args:
        clip_low: ε_low in [0, 1].
        clip_high: ε_high >= 0. Both are far smaller than PPO's: s is a geometric mean and stays near 1.
        token: the token form: s_t = sg[s]·π_t/sg[π_t] with each token's own advantage, averaged over the sequence. Its
            values and gradients are the plain form's where a row's advantages agree.

    The plain form has one advantage a sequence, the mean of its tokens': token credit would be averaged away, so it
    belongs to the token form, which therefore declares `ratio` "token", though its value covers the sequence.

    Denominator: sequences with a token on the mask. Source: Zheng et al. 2025 (arXiv 2507.18071) eq. 5–7 and 13–14.

    Raises:
        ConfigError: a bound outside its range.

    Assumes: the reward judges the whole response, so the ratio should cover it.
    Use it for: mixture-of-experts policies, or a sampler whose numerics differ from the trainer's.
    """
    check_clip("gspo.clip_low", clip_low, 1.0)
    check_clip("gspo.clip_high", clip_high)

    def terms(
        logprobs: Tensor, rollouts: Rollouts, advantages: Tensor, mask: Tensor, segments: Tensor
    ) -> tuple[Tensor, Sums]:
        own = log_ratios(logprobs, rollouts.old_logprobs, mask)
        advantages = torch.where(mask, upcast(advantages), 0.0)
        joint = row_mean(own, mask)  # (B,1)
        if token:
            # value of the sequence ratio, gradient of the token's log π
            used = joint.detach() + (own - own.detach())
            each, clipped = clipped_surrogate(limited_exp(used), advantages, clip_low, clip_high)
            total = row_mean(torch.where(mask, each, 0.0), mask).sum()
        else:
            each, clipped = clipped_surrogate(limited_exp(joint), row_mean(advantages, mask), clip_low, clip_high)
            total = each.sum()  # a row without tokens has advantage 0
        shape = mask.shape
        return total, statistics(own, joint.detach().expand(shape), clipped.expand(shape), mask)

    return PolicyLoss(terms, sequences, "token" if token else "sequence")
