"""Shared parts of redistributors: r' = (1−β)·r + β·α·Σr and its statistics."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from apportion.masking import normalise
from apportion.types import Credit, Rollouts, State

Weights = Callable[[Rollouts], Tensor]


def redistributor(weights: Weights, *, mix: float, needs: frozenset[str], causal: bool) -> Credit:
    """Return the credit that spreads β = `mix` of each row's rewards in proportion to `weights(rollouts)` (B,T).

    The rest, 1−β, stays in place. Row sums are kept for any β because the shares sum to 1: a row whose weights
    have no mass falls back to uniform shares (counted in `credit/fallback_rate`), a row without tokens stays 0.
    Source: Chan et al. 2024 (arXiv 2402.00782), eq. for r_t with β and α.
    """

    def share(rollouts: Rollouts) -> Tensor:
        return normalise(weights(rollouts), rollouts.mask)[0]

    def assign(rollouts: Rollouts, rewards: Tensor, state: State) -> tuple[Tensor, State]:
        if mix == 0.0:  # bitwise the input rewards
            return torch.where(rollouts.mask, rewards, 0), state
        r = torch.where(rollouts.mask, rewards.float(), 0.0)
        spread = mix * share(rollouts) * r.sum(dim=1, keepdim=True)
        return (((1.0 - mix) * r + spread) if mix < 1.0 else spread).to(rewards.dtype), state

    def stats(rollouts: Rollouts, before: Tensor, after: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        raw = torch.where(rollouts.mask, weights(rollouts), 0.0)
        return share_stats(raw, rollouts.mask)

    return Credit(dict, assign, needs, keeps_return=True, causal=causal, share=share, stats=stats)


def share_stats(raw: Tensor, mask: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Return (sum, count) over rows: mass on the mask, largest share, share entropy (nats), fallback, empty rows."""
    shares, fallback = normalise(raw, mask)
    full = mask.any(dim=1)
    rows = full.sum().float()
    entropy = -(shares * shares.clamp_min(1e-30).log()).sum(dim=1)
    sums: Mapping[str, Tensor] = {
        "kept_mass": raw.sum(dim=1)[full].sum(),
        "max_share": shares.amax(dim=1)[full].sum(),
        "share_entropy": entropy[full].sum(),
        "fallback_rate": fallback.float().sum(),
    }
    stats = {f"credit/{k}": (v, rows) for k, v in sums.items()}
    return stats | {"credit/empty_rate": ((~full).float().sum(), torch.ones_like(rows) * len(mask))}
