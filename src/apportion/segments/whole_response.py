"""The whole response as one action: the bandit."""

from __future__ import annotations

import torch
from torch import Tensor

from apportion.segments._boundaries import BoundarySegmenter
from apportion.types import Rollouts, Segmenter


def whole_response() -> Segmenter:
    """Return the segmenter that gives every token of a row id 0, -1 off the mask; (B,T) int64.

    A response of several turns (`rollouts.turn`) has one action a turn: no action crosses a turn.

    Assumes: the response is one decision.
    Use it for: group methods, and the bandit, the limit of macro actions of growing length.
    """
    return BoundarySegmenter(_starts)


def _starts(rollouts: Rollouts) -> Tensor:
    return torch.zeros_like(rollouts.mask)
