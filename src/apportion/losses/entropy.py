"""The entropy of a distribution given by logits."""

from __future__ import annotations

import torch
from torch import Tensor


def entropy_of(logits: Tensor) -> Tensor:
    """Return the entropy in nats of softmax(logits) (…,V) -> (…); −inf logits have no mass."""
    logp = logits.log_softmax(dim=-1)
    return -(logp.exp() * logp.masked_fill(logp == -torch.inf, 0.0)).sum(dim=-1)
