"""Losses as sums over the mask beside their statistics; the caller divides by the denominator of the whole batch."""

from __future__ import annotations

import torch
from torch import Tensor

Sums = dict[str, Tensor]


def clipped_policy(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, *, clip: float = 0.2
) -> tuple[Tensor, Sums]:
    """Return (sum over tokens of max(−A·ρ, −A·clip(ρ, 1±ε)), statistics as sums over tokens).

    ρ = exp(log π − log π_old) a token; all tensors (B,T), advantages already whitened or not as the caller chose.
    Masked positions have ratio exactly 1 and add 0. Statistics: "policy/approxkl" (k3, nats), "policy/clipfrac",
    "val/ratio". Denominator: tokens. Source: Schulman et al. 2017 (arXiv 1707.06347) eq. 7.
    """
    log_ratio = torch.where(mask, logprobs - old_logprobs, 0.0)
    ratio = log_ratio.exp()
    plain, limited = -advantages * ratio, -advantages * ratio.clamp(1.0 - clip, 1.0 + clip)
    loss = torch.where(mask, torch.maximum(plain, limited), 0.0).sum()
    with torch.no_grad():
        sums = {
            "policy/approxkl": torch.where(mask, ratio - 1.0 - log_ratio, 0.0).sum(),
            "policy/clipfrac": (mask & (limited > plain)).sum().float(),
            "val/ratio": torch.where(mask, ratio, 0.0).sum(),
        }
    return loss, sums


def clipped_value(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, *, clip: float | None = 0.2
) -> tuple[Tensor, Sums]:
    """Return (sum over the mask of ½·max((V−G)², (clip(V, V_old±ε)−G)²), {"loss/value_clipfrac": sum}).

    All tensors (B,T); `mask` marks the tokens whose value is regressed. `clip` None is the plain squared error.
    Denominator: the marked tokens. Source: Schulman et al. 2017's code; Huang et al. 2024 (arXiv 2403.17031).
    """
    # replaced before squaring: what stands off the mask, NaN included, must not reach the gradient
    values, old_values, returns = (torch.where(mask, x, 0.0) for x in (values, old_values, returns))
    plain = (values - returns) ** 2
    if clip is None:
        return 0.5 * torch.where(mask, plain, 0.0).sum(), {"loss/value_clipfrac": plain.new_zeros(())}
    limited = (old_values + (values - old_values).clamp(-clip, clip) - returns) ** 2
    loss = 0.5 * torch.where(mask, torch.maximum(plain, limited), 0.0).sum()
    return loss, {"loss/value_clipfrac": (mask & (limited > plain)).sum().float().detach()}


def entropy_of(logits: Tensor) -> Tensor:
    """Return the entropy in nats of softmax(logits) (…,V) -> (…); −inf logits have no mass."""
    logp = logits.log_softmax(dim=-1)
    return -(logp.exp() * logp.masked_fill(logp == -torch.inf, 0.0)).sum(dim=-1)
