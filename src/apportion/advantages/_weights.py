"""Credit shares as weights of a row's tokens: mean 1, none above a cap."""

from __future__ import annotations

import torch
from torch import Tensor

from apportion.masking import check_finite, normalise
from apportion.types import Rollouts

SHARE = "credit_share"


def share_of(rollouts: Rollouts, on: Tensor) -> tuple[Tensor, Tensor]:
    """Return (evidence "credit_share" (B,T) float32 with rows that sum to 1 over `on`, rows that fell back (B,)).

    A row whose share has no mass becomes uniform.

    Raises:
        DataError: it is absent, or on the mask negative or not finite.
    """
    fix = "Use a credit that has a share (uniform, attention, …), or credit_mix: 0."
    share = torch.where(on, rollouts.require(SHARE, fix).float(), 0.0)
    fix = "A signed credit cannot weight advantages: it would flip their sign."
    check_finite(f"evidence['{SHARE}']", share, fix, least=0.0)
    return normalise(share, on)


def credit_weights(share: Tensor, on: Tensor, mix: float, cap: float | None) -> tuple[Tensor, Tensor]:
    """Return (weights (B,T) of each token: mean 1 over a row, none above `cap`; where the cap is active, (B,T) bool).

    Uncapped, w = (1−β) + β·n·share with β = `mix` and n the row's tokens. Capped, w' = min(cap, c·w) with the one
    c >= 1 that gives a mean of 1: the excess over the cap goes to the tokens below it in proportion to their weights,
    until none is above. Where those have no weight (β = 1 and a share of 0) it goes to them evenly. A mean of 1 is
    always possible because cap >= 1. 0 off the mask `on`.

    c is found exactly, by sorting: with the k largest at the cap, c_k = (n − k·cap) ÷ (sum of the others), and the
    smallest k with c_k·w_(k+1) <= cap is the one.
    """
    count = on.sum(dim=1, keepdim=True).float()
    raw = torch.where(on, (1.0 - mix) + mix * count * share, 0.0)
    if cap is None or raw.shape[1] == 0:
        return raw, torch.zeros_like(on)
    ordered = raw.sort(dim=1, descending=True).values
    # the sum of all but the k largest, for k = 0..T−1, added from the small end so that no digits cancel
    rest = ordered.flip(1).cumsum(dim=1).flip(1)
    k = torch.arange(raw.shape[1], device=raw.device)
    left = (count - k * cap).clamp_min(0.0)
    fits = (left * ordered <= cap * rest * (1.0 + 1e-6)) | (ordered == 0)
    at_cap = fits.int().argmax(dim=1, keepdim=True)  # (B,1) tokens at the cap
    left, rest = left.gather(1, at_cap), rest.gather(1, at_cap)
    largest = ordered.gather(1, (at_cap - 1).clamp_min(0))
    full = on & (at_cap > 0) & (raw >= largest)
    even = left / (count - at_cap).clamp_min(1.0)
    below = torch.where(rest > 0, raw * (left / torch.where(rest > 0, rest, 1.0)), even).clamp_max(cap)
    return torch.where(on, torch.where(full, cap, below), 0.0), full
