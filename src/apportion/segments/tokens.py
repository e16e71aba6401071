"""Tokens as actions: token-level PPO."""

from __future__ import annotations

import torch
from torch import Tensor

from apportion.types import Rollouts, Segmenter


def tokens() -> Segmenter:
    """Return the segmenter that numbers each row's masked tokens 0, 1, 2, …; -1 off the mask. (B,T) int64.

    Assumes: each token is one decision.
    Use it for: the default: token-level PPO.
    """
    return _Tokens()


class _Tokens:
    needs: frozenset[str] = frozenset()

    def __call__(self, rollouts: Rollouts) -> Tensor:
        return torch.where(rollouts.mask, rollouts.mask.cumsum(dim=1) - 1, -1)
