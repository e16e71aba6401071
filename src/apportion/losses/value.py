"""The value loss: squared error to the returns, clipped around the values at sampling time."""

from __future__ import annotations

import torch
from torch import Tensor

from apportion.losses._ratios import Sums


def clipped_value(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, *, clip: float | None = 0.2
) -> tuple[Tensor, Sums]:
    """Return (sum over the mask of ½·max((V−G)², (clip(V, V_old±ε)−G)²), {"loss/value_clipfrac": sum}).

    All tensors (B,T); `mask` marks the tokens with a value target. `clip` None is the plain squared error.
    Denominator: the marked tokens. Source: Schulman et al. 2017's code; Huang et al. 2024 (arXiv 2403.17031).
    """
    # replaced before squaring: values off the mask, NaN included, must not reach the gradient
    values, old_values, returns = (torch.where(mask, x, 0.0) for x in (values, old_values, returns))
    plain = (values - returns) ** 2
    if clip is None:
        return 0.5 * torch.where(mask, plain, 0.0).sum(), {"loss/value_clipfrac": plain.new_zeros(())}
    limited = (old_values + (values - old_values).clamp(-clip, clip) - returns) ** 2
    loss = 0.5 * torch.where(mask, torch.maximum(plain, limited), 0.0).sum()
    # within the clip range the two differ only by rounding, which is not clipping
    clipped = mask & ((values - old_values).abs() > clip) & (limited > plain)
    return loss, {"loss/value_clipfrac": clipped.sum().float().detach()}
