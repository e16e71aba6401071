"""Length penalty: the last token pays for tokens beyond a target, linearly or as a soft overlong ramp."""

from __future__ import annotations

import torch
from torch import Tensor

from apportion.errors import check_number, check_whole
from apportion.masking import is_last
from apportion.types import Credit, Rollouts, State


def length_penalty(*, coef: float = 0.01, target: int = 0, limit: int | None = None) -> Credit:
    """Return the rewards with each row's last token paying for the row's n sampled tokens:

        −c·max(0, n − target)                                   without `limit`: c = `coef` a token
        −c·clip((n − target) / (limit − target), 0, 1)          with `limit`: from 0 at target to c at limit and beyond

    The second is DAPO's soft overlong punishment with target = L_max − L_cache, limit = L_max and coef = 1. It does
    not keep the return. Causal: the number of tokens is known at the last one. In a chain it comes after a
    redistributor, so that it is not redistributed. A row that was cut off, with evidence "bootstrap_values" for what
    would have followed, pays nothing: the value after the cut holds the cost of the whole response.

    Args:
        coef: c >= 0, in units of the score.
        target: number of tokens that cost nothing, >= 0.
        limit: number of tokens at which the ramp is full, > target; None for no ramp.

    Raises:
        ConfigError: a setting outside its range.

    Sources: Singhal et al. 2023 (arXiv 2310.03716) for the first; Yu et al. 2025, DAPO (arXiv 2503.14476) eq. 13.

    Assumes: length is a cost in itself.
    Use it when responses grow without getting better, or are cut off at the limit.
    """
    check_number("length_penalty.coef", coef, 0.0)
    fix = "Count sampled tokens, EOS included."
    check_whole("length_penalty.target", target, 0, fix)
    if limit is not None:
        check_whole("length_penalty.limit", limit, target + 1, fix)

    def costs(rollouts: Rollouts) -> Tensor:
        over = (rollouts.mask.sum(dim=1) - target).clamp_min(0).float()
        cost = coef * (over if limit is None else (over / (limit - target)).clamp_max(1.0))
        return torch.where(rollouts.bootstrapped, 0.0, cost)

    def assign(rollouts: Rollouts, rewards: Tensor, state: State) -> tuple[Tensor, State]:
        paid = rewards.float() - torch.where(is_last(rollouts.mask), costs(rollouts)[:, None], 0.0)
        return torch.where(rollouts.mask, paid, 0.0).to(rewards.dtype), state

    def stats(rollouts: Rollouts, before: Tensor, after: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        cost, rows = costs(rollouts), rollouts.mask.any(dim=1).sum().float()
        return {
            "credit/length_cost": (cost.sum(), rows),
            "credit/length_over_rate": ((cost > 0).sum().float(), rows),
        }

    return Credit(dict, assign, frozenset(), keeps_return=False, causal=True, stats=stats)
