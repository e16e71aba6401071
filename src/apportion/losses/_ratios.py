"""Shared parts of policy losses: importance ratios, the clipped surrogate, statistics and denominators."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from apportion.errors import check_number
from apportion.masking import segment_sum
from apportion.types import Rollouts

Sums = dict[str, Tensor]

# e^20 is 5e8: far beyond every clip, far below float32's overflow at e^88. Beyond it a ratio is constant: its gradient
# is 0 instead of inf·0 = NaN, and its tokens are counted in "policy/ratio_limited"
LIMIT = 20.0


def upcast(x: Tensor) -> Tensor:
    """Return `x` in float32, or as it is in float64."""
    return x if x.dtype == torch.float64 else x.float()


def log_ratios(logprobs: Tensor, old_logprobs: Tensor, mask: Tensor) -> Tensor:
    """Return log π − log π_old of each token (B,T), nats, exactly 0 off the mask."""
    return torch.where(mask, upcast(logprobs) - upcast(old_logprobs), 0.0)


def limited_exp(log_ratio: Tensor) -> Tensor:
    """Return exp(log_ratio) with its argument clamped to ±LIMIT."""
    return log_ratio.clamp(-LIMIT, LIMIT).exp()


def clipped_surrogate(ratio: Tensor, advantages: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    """Return (max(−A·ρ, −A·clip(ρ, 1−low, 1+high)), where the clip is active), eq. 7 of PPO (1707.06347)."""
    plain, limited = -advantages * ratio, -advantages * ratio.clamp(1.0 - low, 1.0 + high)
    return torch.maximum(plain, limited), (limited > plain).detach()


@torch.no_grad()
def statistics(log_ratio: Tensor, used: Tensor, clipped: Tensor, mask: Tensor) -> Sums:
    """Return the statistics of every policy loss as sums over tokens.

    Args:
        log_ratio: (B,T) each token's own, from `log_ratios`.
        used: (B,T) the log-ratio that the loss used at each token: its own, its action's or its sequence's.
        clipped: (B,T) bool, where the clip is active; spread over the tokens that share a ratio.

    "policy/approxkl" is k3 of each token's own ratio, (ρ−1)−log ρ in nats, so that it means the same under every loss.
    "val/ratio" is the ratio that the loss used, "policy/clipfrac" the tokens where the clip was active, and
    "policy/ratio_limited" those whose log-ratio was clamped to ±LIMIT before exp.
    """
    zero = torch.zeros_like(log_ratio)
    return {
        "policy/approxkl": torch.where(mask, limited_exp(log_ratio) - 1.0 - log_ratio, zero).sum(),
        "policy/clipfrac": (mask & clipped).sum().float(),
        "policy/ratio_limited": (mask & (used.abs() > LIMIT)).sum().float(),
        "val/ratio": torch.where(mask, limited_exp(used), zero).sum(),
    }


def reference_kl(logprobs: Tensor, rollouts: Rollouts, mask: Tensor) -> Tensor:
    """Return k3 of each token to the reference, (π_ref/π − 1) − log(π_ref/π), (B,T) nats, 0 off the mask.

    Differentiable in `logprobs`. Source: Schulman 2020, "Approximating KL divergence"; DeepSeekMath (2402.03300) eq. 4.

    Raises:
        DataError: evidence "reference_logprobs" absent.
    """
    fix = "Score the rollouts with the reference model, or use kl_coef: 0."
    gap = log_ratios(rollouts.require("reference_logprobs", fix), logprobs, mask)
    return torch.where(mask, limited_exp(gap) - 1.0 - gap, 0.0)


def tokens(mask: Tensor, segments: Tensor) -> Tensor:
    """Return the number of tokens on `mask` (B,T), a float32 scalar: a denominator."""
    return mask.sum().float()


def actions(mask: Tensor, segments: Tensor) -> Tensor:
    """Return the number of actions of `segments` (B,T) with a token on `mask` (B,T), a float32 scalar."""
    return (segment_sum(mask.float(), on_mask(segments, mask)) > 0).sum().float()


def sequences(mask: Tensor, segments: Tensor) -> Tensor:
    """Return the number of rows with a token on `mask` (B,T), a float32 scalar; other rows do not count."""
    return mask.any(dim=1).sum().float()


def on_mask(segments: Tensor, mask: Tensor) -> Tensor:
    """Return `segments` (B,T) with −1 wherever `mask` is False."""
    return torch.where(mask & (segments >= 0), segments, -1)


def entropy_of(logits: Tensor) -> Tensor:
    """Return the entropy in nats of softmax(logits) (…,V) -> (…); −inf logits have no mass."""
    logp = logits.log_softmax(dim=-1)
    return -(logp.exp() * logp.masked_fill(logp == -torch.inf, 0.0)).sum(dim=-1)


def row_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Return the mean over each row's mask, (B,1); 0 for a row without tokens. `x` (B,T) is 0 off the mask."""
    return x.sum(dim=1, keepdim=True) / mask.sum(dim=1, keepdim=True).clamp_min(1)


def action_mean(x: Tensor, ids: Tensor) -> Tensor:
    """Return the mean of `x` (B,T) over each action, (B,S); 0 for an action without tokens."""
    size = segment_sum((ids >= 0).to(x.dtype), ids).clamp_min(1)
    return segment_sum(torch.where(ids >= 0, x, 0.0), ids) / size


def check_clip(field: str, value: float, most: float = math.inf) -> float:
    """Return `value` if it is a number in [0, most]; raise ConfigError that names `field` otherwise."""
    return check_number(field, value, 0.0, "0.2 is usual for token ratios.", most=most)
