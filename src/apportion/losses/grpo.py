"""GRPO: clipped token ratios, averaged per sequence, with the KL to the reference in the loss."""

from __future__ import annotations

import torch
from torch import Tensor

from apportion.losses._ratios import (
    Sums,
    check_clip,
    clipped_surrogate,
    limited_exp,
    log_ratios,
    reference_kl,
    row_mean,
    sequences,
    statistics,
    upcast,
)
from apportion.types import PolicyLoss, Rollouts


def grpo(clip: float = 0.2, kl_coef: float = 0.0) -> PolicyLoss:
    """Return GRPO's loss: max(−A·ρ, −A·clip(ρ, 1±ε)) + κ·k3 averaged over each sequence's tokens, then over sequences.

    A token of a long response has less weight than one of a short response (see `dr_grpo`, `dapo`).

    Args:
        clip: ε in [0, 1].
        kl_coef: κ >= 0 of the KL to the reference inside the loss; above 0 it needs evidence "reference_logprobs", and
            its sum over tokens is logged as "policy/reference_kl". GRPO has it here and not in the reward.

    Denominator: sequences with a token on the mask. Source: Shao et al. 2024 (DeepSeekMath, arXiv 2402.03300) eq. 3–4.

    Raises:
        ConfigError: a setting outside its range.

    Assumes: every response has the same weight, however long.
    Use it for: reproducing GRPO.
    """
    check_clip("grpo.clip", clip, 1.0)
    check_clip("grpo.kl_coef", kl_coef)

    def terms(
        logprobs: Tensor, rollouts: Rollouts, advantages: Tensor, mask: Tensor, segments: Tensor
    ) -> tuple[Tensor, Sums]:
        each, sums = token_terms(logprobs, rollouts, advantages, mask, clip, kl_coef)
        return row_mean(each, mask).sum(), sums

    return PolicyLoss(terms, sequences, "token", reference_needs(kl_coef))


def token_terms(
    logprobs: Tensor, rollouts: Rollouts, advantages: Tensor, mask: Tensor, clip: float, kl_coef: float
) -> tuple[Tensor, Sums]:
    """Return (each token's clipped term plus κ·k3, (B,T), 0 off the mask; statistics as sums over tokens)."""
    log_ratio = log_ratios(logprobs, rollouts.old_logprobs, mask)
    each, clipped = clipped_surrogate(limited_exp(log_ratio), torch.where(mask, upcast(advantages), 0.0), clip, clip)
    sums = statistics(log_ratio, log_ratio, clipped, mask)
    each = torch.where(mask, each, 0.0)
    if kl_coef == 0.0:
        return each, sums
    kl = reference_kl(logprobs, rollouts, mask)
    return each + kl_coef * kl, sums | {"policy/reference_kl": kl.detach().sum()}


def reference_needs(kl_coef: float) -> frozenset[str]:
    """Return the evidence needed by a KL of weight `kl_coef` inside the loss."""
    return frozenset({"reference_logprobs"}) if kl_coef > 0.0 else frozenset()
