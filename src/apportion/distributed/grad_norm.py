"""Norm of all gradients in float32, computed in blocks."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

BLOCK = 1 << 19  # weights at a time on a CPU: 2 MiB of each float32 operand, which its caches hold
GPU_BLOCK = 1 << 24  # on a GPU, where few launches count and caches do not


def block(device: torch.device) -> int:
    """Return how many weights a block has on `device`."""
    return BLOCK if device.type == "cpu" else GPU_BLOCK


def total_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Return the 2-norm of all gradients together, computed in float32 whatever their dtype; 0 without any."""
    squares: list[Tensor] = []
    wide = torch.empty(0)
    for grad in [p.grad for p in parameters if p.grad is not None]:
        for part in grad.reshape(-1).split(block(grad.device)):
            if part.dtype != torch.float32:  # a norm of 16-bit numbers is not vectorised: widen a block first
                wide = wide if len(wide) >= len(part) and wide.device == grad.device else torch.empty_like(part).float()
                part = wide[: len(part)].copy_(part)
            squares.append(part.dot(part))
    return torch.stack(squares).sum().sqrt() if squares else torch.zeros(())
