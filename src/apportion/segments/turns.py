"""Turns as actions: the tokens that the policy generates between two external messages."""

from __future__ import annotations

import torch
from torch import Tensor

from apportion.segments._boundaries import BoundarySegmenter
from apportion.types import Rollouts, Segmenter


def turns() -> Segmenter:
    """Return the segmenter that makes each turn an action, (B,T) int64.

    A turn is given by `rollouts.turn`. Where that is None, each run of the mask between two holes (a tool's output,
    say) is one; then a response without holes is one action.

    Assumes: a turn is one decision.
    Use it when responses have several turns, with text of a tool or a user between them.
    """
    return BoundarySegmenter(_starts)


def _starts(rollouts: Rollouts) -> Tensor:
    mask = rollouts.mask
    if rollouts.turn is not None or not mask.shape[1]:
        return torch.zeros_like(mask)  # the turns themselves start an action
    return torch.cat([mask[:, :1], mask[:, 1:] & ~mask[:, :-1]], dim=1)
