"""Masked reductions, whitening, and moving between tokens and segments.

Every reduction takes `reduce`, which receives local sums and returns global ones (identity on one process), so that
the same code gives global statistics under data parallelism. Shapes: B rows, T tokens, S segments.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Reduce = Callable[[Tensor], Tensor]


def identity(x: Tensor) -> Tensor:
    """Return `x`: the reduction over one process."""
    return x


def last_index(mask: Tensor) -> Tensor:
    """Return the index of each row's last True, (B,) int64; -1 for a row without one. `mask` (B,T) bool."""
    steps = torch.arange(1, mask.shape[1] + 1, device=mask.device)
    return (mask * steps).amax(dim=1) - 1 if mask.shape[1] else mask.new_full((len(mask),), -1, dtype=torch.int64)


def first_index(mask: Tensor) -> Tensor:
    """Return the index of each row's first True, (B,) int64; 0 for a row without one. `mask` (B,T) bool."""
    return mask.int().argmax(dim=1)


def place_on_last(values: Tensor, mask: Tensor) -> Tensor:
    """Return zeros (B,T) with `values` (B,) on each row's last True; a row without tokens stays 0."""
    out = torch.zeros(mask.shape, dtype=values.dtype, device=mask.device)
    last = last_index(mask)
    rows = (last >= 0).nonzero().squeeze(1)
    out[rows, last[rows]] = values[rows]
    return out


def masked_sum(x: Tensor, mask: Tensor, reduce: Reduce = identity) -> tuple[Tensor, Tensor]:
    """Return (sum over the mask, number of tokens), both scalars and both reduced."""
    total = torch.where(mask, x, 0).sum(dtype=torch.float32)
    pair = reduce(torch.stack([total, mask.sum().to(torch.float32)]))
    return pair[0], pair[1]


def masked_mean(x: Tensor, mask: Tensor, reduce: Reduce = identity) -> Tensor:
    """Return the mean of `x` (B,T) over `mask` (B,T); 0 when nothing is on the mask."""
    total, count = masked_sum(x, mask, reduce)
    return total / count.clamp_min(1)


def whiten(x: Tensor, mask: Tensor, *, keep_mean: bool = False, eps: float = 1e-8, reduce: Reduce = identity) -> Tensor:
    """Return `x` (B,T) scaled to unit variance over the mask, 0 off it.

    The mean is removed (advantages) unless `keep_mean` (rewards). With fewer than two tokens nothing is scaled.
    """
    total, count = masked_sum(x, mask, reduce)
    mean = total / count.clamp_min(1)
    square, _ = masked_sum((x - mean) ** 2, mask, reduce)
    scale = torch.rsqrt(square / (count - 1).clamp_min(1) + eps) if count > 1 else torch.ones_like(mean)
    white = (x - mean) * scale
    return torch.where(mask, white + mean if keep_mean else white, 0).to(x.dtype)


def normalise(weights: Tensor, mask: Tensor, eps: float = 1e-12) -> tuple[Tensor, Tensor]:
    """Return (shares (B,T) float32 that sum to 1 over each row's mask, fallback (B,) bool).

    A row whose kept mass is below `eps` falls back to uniform and is marked; a row without tokens stays 0.
    """
    # dividing by the row's largest first keeps sums of 1e30s and of 1e-30s finite
    kept = torch.where(mask, weights.float(), 0.0)
    peak = kept.amax(dim=1, keepdim=True) if kept.shape[1] else kept.new_zeros(len(kept), 1)
    fallback = ~(peak.squeeze(1) > eps) | ~torch.isfinite(peak.squeeze(1))
    flat = mask.float()
    scaled = torch.where(fallback[:, None], flat, kept / torch.where(fallback[:, None], torch.ones_like(peak), peak))
    return scaled / scaled.sum(dim=1, keepdim=True).clamp_min(eps), fallback & mask.any(dim=1)


def segment_count(segments: Tensor) -> int:
    """Return S, the largest number of segments in a row of `segments` (B,T) int64 (at least 1)."""
    return max(int(segments.max()) + 1, 1) if segments.numel() else 1


def segment_sum(x: Tensor, segments: Tensor) -> Tensor:
    """Return sums of `x` (B,T) over each segment, (B,S). `segments` (B,T) int64 from 0, -1 off the mask."""
    on = segments >= 0
    out = x.new_zeros(len(x), segment_count(segments))
    return out.scatter_add_(1, segments.clamp_min(0), torch.where(on, x, torch.zeros_like(x)))


def spread(values: Tensor, segments: Tensor) -> Tensor:
    """Return (B,T): each token gets its segment's entry of `values` (B,S), and 0 off the mask."""
    return torch.where(segments >= 0, values.gather(1, segments.clamp_min(0)), 0)
