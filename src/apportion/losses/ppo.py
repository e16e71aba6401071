"""PPO's clipped surrogate, with one ratio a token or one a macro action."""

from __future__ import annotations

import torch
from torch import Tensor

from apportion.errors import unknown_name
from apportion.losses._ratios import (
    Sums,
    action_mean,
    actions,
    check_clip,
    clipped_surrogate,
    limited_exp,
    log_ratios,
    on_mask,
    statistics,
    tokens,
    upcast,
)
from apportion.masking import segment_sum, spread
from apportion.types import PolicyLoss, Rollouts

RATIOS = ("token", "action")


def ppo(clip: float = 0.2, ratio: str = "token") -> PolicyLoss:
    """Return PPO's loss, max(−A·ρ, −A·clip(ρ, 1±ε)), summed over tokens or over actions.

    Args:
        clip: ε >= 0, at most 1.
        ratio: "token": ρ_t = π/π_old of each token, A_t its own advantage, divided by the number of tokens.
            "action": ρ_k = exp(Σ log-ratio over the tokens of action k), one term an action, divided by the number of
            actions; A_k is the mean of its tokens' advantages, which is the action's advantage where they agree. A
            product of n ratios leaves 1±ε about n times sooner than one, so compare the two at equal clip fraction.

    With actions of one token the two are equal; with `whole_response` the second has one ratio a sequence. Log-ratios
    are clamped to ±20 before exp and the affected tokens counted in "policy/ratio_limited".

    Raises:
        ConfigError: `clip` or `ratio` outside its range.

    Sources: Schulman et al. 2017 (arXiv 1707.06347) eq. 7; Chai et al. 2024 (arXiv 2410.02743) for actions.

    Assumes: the surrogate is unreliable where a token's probability has moved by more than ε.
    Use it for: the default, with several epochs a batch.
    """
    check_clip("ppo.clip", clip, 1.0)
    if ratio not in RATIOS:
        raise unknown_name("ppo.ratio", str(ratio), RATIOS)

    def token_terms(
        logprobs: Tensor, rollouts: Rollouts, advantages: Tensor, mask: Tensor, segments: Tensor
    ) -> tuple[Tensor, Sums]:
        return clipped_policy(logprobs, rollouts.old_logprobs, advantages, mask, clip=clip)

    def action_terms(
        logprobs: Tensor, rollouts: Rollouts, advantages: Tensor, mask: Tensor, segments: Tensor
    ) -> tuple[Tensor, Sums]:
        ids = on_mask(segments, mask)
        own = log_ratios(logprobs, rollouts.old_logprobs, mask)
        joint = segment_sum(own, ids)  # (B,S); an action without tokens has ratio 1 and advantage 0
        terms, clipped = clipped_surrogate(limited_exp(joint), action_mean(upcast(advantages), ids), clip, clip)
        used = spread(joint.detach(), ids)
        return terms.sum(), statistics(own, used, spread(clipped.float(), ids) > 0, mask)

    if ratio == "token":
        return PolicyLoss(token_terms, tokens, "token")
    return PolicyLoss(action_terms, actions, "action")


def clipped_policy(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, *, clip: float = 0.2
) -> tuple[Tensor, Sums]:
    """Return (sum over tokens of max(−A·ρ, −A·clip(ρ, 1±ε)), statistics as sums over tokens).

    ρ = exp(log π − log π_old) a token; all tensors (B,T); advantages are used as given, whitened or not.
    Masked positions have ratio exactly 1 and add 0. Statistics: "policy/approxkl" (k3, nats), "policy/clipfrac",
    "policy/ratio_limited", "val/ratio". Denominator: tokens. Source: Schulman et al. 2017 (arXiv 1707.06347) eq. 7.
    """
    return clipped_tokens(logprobs, old_logprobs, advantages, mask, clip, clip)


def clipped_tokens(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, low: float, high: float
) -> tuple[Tensor, Sums]:
    """Return `clipped_policy` with its own bounds below and above 1."""
    log_ratio = log_ratios(logprobs, old_logprobs, mask)
    terms, clipped = clipped_surrogate(limited_exp(log_ratio), torch.where(mask, upcast(advantages), 0.0), low, high)
    return torch.where(mask, terms, 0.0).sum(), statistics(log_ratio, log_ratio, clipped, mask)
