"""Sparse credit: the whole score stays on the last token (plain RLHF)."""

from __future__ import annotations

import torch
from torch import Tensor

from apportion.types import Credit, Rollouts, State


def sparse() -> Credit:
    """Return the credit that leaves the rewards (B,T) where they are: the score on each row's last token.

    The identity of `chain`; ABC with β = 0 equals it bitwise. Causal: the reward at t depends on tokens up to t.
    Source: Ouyang et al. 2022 (arXiv 2203.02155).

    Assumes: the critic can propagate one late reward back to the tokens that earned it.
    Use it for: the baseline of every comparison, and short responses; its gradient is unbiased.
    """

    def assign(rollouts: Rollouts, rewards: Tensor, state: State) -> tuple[Tensor, State]:
        return torch.where(rollouts.mask, rewards, 0), state

    return Credit(dict, assign, frozenset(), keeps_return=True, causal=True)
