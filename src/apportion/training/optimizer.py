"""The optimizer of any training stage and its learning-rate schedule."""

from __future__ import annotations

import torch
from torch import Tensor

from apportion.config.sections import OptimConfig
from apportion.models.master_weights import MasterAdamW


def zero_with_grad(x: Tensor) -> Tensor:
    """Return 0 (), whose gradient for `x` is 0 even where `x` is not finite."""
    return torch.where(torch.zeros_like(x, dtype=torch.bool), x, 0.0).sum()


def make_optimizer(
    parameters: list[torch.nn.Parameter], remainders: dict[torch.nn.Parameter, Tensor], config: OptimConfig
) -> MasterAdamW:
    """Return AdamW over `parameters`, of which some have the lower halves of their float32 masters in `remainders`."""
    return MasterAdamW(
        parameters,
        lr=config.lr,
        eps=config.eps,
        weight_decay=config.weight_decay,
        remainders=remainders,
        moments=config.moments,
    )


def learning_rate(config: OptimConfig, step: int, steps: int) -> float:
    """Return the rate of batch `step` (from 0) of `steps`: up linearly over the warm-up, then down linearly to 0."""
    rise = max(1, round(config.warmup * steps))
    scale = (step + 1) / rise if step < rise else (steps - step) / max(1, steps - rise)
    return config.lr * min(1.0, scale)
