"""Masked reductions, whitening, positions on a mask, and moving values between tokens and segments.

Every reduction takes `reduce`, which receives local sums and returns global ones (identity on one process), so that
the same code gives global statistics under data parallelism. Shapes: B rows, T tokens, S segments.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from apportion.errors import ApportionError, DataError

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


def is_first(mask: Tensor) -> Tensor:
    """Return (B,T) bool, True on each row's first token of `mask` (B,T)."""
    return mask & (torch.arange(mask.shape[1], device=mask.device) == first_index(mask)[:, None])


def is_last(mask: Tensor) -> Tensor:
    """Return (B,T) bool, True on each row's last token of `mask` (B,T)."""
    return mask & (torch.arange(mask.shape[1], device=mask.device) == last_index(mask)[:, None])


def previous_index(mask: Tensor) -> Tensor:
    """Return (B,T) int64: the index of the last token of `mask` (B,T) before this one, -1 where there is none."""
    columns = torch.arange(mask.shape[1], device=mask.device).expand(mask.shape)
    if not mask.shape[1]:
        return columns
    latest = torch.where(mask, columns, -1).cummax(dim=1).values
    return torch.cat([latest.new_full((len(mask), 1), -1), latest[:, :-1]], dim=1)


def previous(values: Tensor, mask: Tensor, start: Tensor | float = 0.0) -> Tensor:
    """Return (B,T): the entry of `values` (B,T) at the token before, `start` ((B,1) or a number) on each row's first.

    "Before" skips holes. The result is undefined off the mask.
    """
    index = previous_index(mask)
    return torch.where(index < 0, start, values.gather(1, index.clamp_min(0)))


def place_on_last(values: Tensor, mask: Tensor) -> Tensor:
    """Return zeros (B,T) with `values` (B,) on each row's last True; a row without tokens stays 0."""
    out = torch.zeros(mask.shape, dtype=values.dtype, device=mask.device)
    last = last_index(mask)
    rows = (last >= 0).nonzero().squeeze(1)
    out[rows, last[rows]] = values[rows]
    return out


def masked_sum(
    x: Tensor, mask: Tensor, reduce: Reduce = identity, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Return (sum over the mask, number of tokens), both scalars in `dtype` and both reduced."""
    total = torch.where(mask, x, 0).sum(dtype=dtype)
    pair = reduce(torch.stack([total, mask.sum().to(dtype)]))
    return pair[0], pair[1]


def masked_mean(x: Tensor, mask: Tensor, reduce: Reduce = identity) -> Tensor:
    """Return the mean of `x` (B,T) over `mask` (B,T); 0 when nothing is on the mask."""
    total, count = masked_sum(x, mask, reduce)
    return total / count.clamp_min(1)


class Moments(NamedTuple):
    """The mean () over a mask, 1 over the standard deviation (), and the dtype in which both were computed."""

    mean: Tensor
    scale: Tensor
    dtype: torch.dtype


def moments(x: Tensor, mask: Tensor, *, eps: float = 1e-8, reduce: Reduce = identity) -> Moments:
    """Return the moments of `x` (B,T) over the mask, in float32, or in float64 where float32 cannot hold the squares.

    With fewer than two tokens the scale is 1.

    Raises:
        DataError: finite numbers whose squares float64 cannot hold either.
    """
    for dtype in (torch.float32, torch.float64):
        wide = x if x.dtype in (dtype, torch.float64) else x.to(dtype)
        total, count = masked_sum(wide, mask, reduce, dtype)
        mean = total / count.clamp_min(1)
        square, _ = masked_sum((wide - mean) ** 2, mask, reduce, dtype)
        if torch.isfinite(square):
            break
    else:
        largest = float(torch.where(mask, x, 0).abs().max())
        if math.isfinite(largest):
            fix = "Scale the scores (scores.scale) or the rewards first."
            raise DataError("numbers to whiten", largest, "numbers with a finite variance", fix)
    scale = torch.rsqrt(square / (count - 1).clamp_min(1) + eps) if count > 1 else torch.ones_like(mean)
    return Moments(mean, scale, dtype)


def whiten(
    x: Tensor,
    mask: Tensor,
    *,
    keep_mean: bool = False,
    eps: float = 1e-8,
    reduce: Reduce = identity,
    known: Moments | None = None,
) -> Tensor:
    """Return `x` (B,T) scaled to unit variance over the mask, 0 off it, in its dtype.

    The mean is removed (advantages) unless `keep_mean` (rewards). With fewer than two tokens nothing is scaled. `known`
    are the moments to use instead, of a larger batch. Raises DataError as `moments` does.
    """
    mean, scale, dtype = moments(x, mask, eps=eps, reduce=reduce) if known is None else known
    wide = x if x.dtype in (dtype, torch.float64) else x.to(dtype)
    white = (wide - mean) * scale
    return torch.where(mask, white + mean if keep_mean else white, 0).to(x.dtype)


def normalise(weights: Tensor, mask: Tensor, eps: float = 1e-12) -> tuple[Tensor, Tensor]:
    """Return (shares (B,T) float32 that sum to 1 over each row's mask, fallback (B,) bool).

    A row whose largest weight is at most `eps` falls back to uniform and is marked; a row without tokens stays 0.
    """
    # dividing by the row's largest first keeps sums of 1e30s and of 1e-30s finite
    masked = torch.where(mask, weights.float(), 0.0)
    peak = masked.amax(dim=1, keepdim=True) if masked.shape[1] else masked.new_zeros(len(masked), 1)
    fallback = ~(peak.squeeze(1) > eps) | ~torch.isfinite(peak.squeeze(1))
    flat = mask.float()
    scaled = torch.where(fallback[:, None], flat, masked / torch.where(fallback[:, None], torch.ones_like(peak), peak))
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


def is_segment_start(segments: Tensor) -> Tensor:
    """Return (B,T) bool, True on the first token of each segment of `segments` (B,T), whose ids never fall in a row."""
    before = torch.nn.functional.pad(segments, (1, 0), value=-1)[:, :-1]
    return segments > before.cummax(dim=1).values if segments.shape[1] else segments >= 0


def check_finite(
    field: str, values: Tensor, fix: str, *, error: type[ApportionError] = DataError, least: float | None = None
) -> Tensor:
    """Return `values` (B,) or (B,T) if every number is finite and, with `least`, at least that.

    Raises:
        error: one is not; it names `field`, the row and, in (B,T), the token.
    """
    wrong = ~torch.isfinite(values) if least is None else ~torch.isfinite(values) | (values < least)
    if wrong.any():
        at = [int(i) for i in wrong.nonzero()[0]]
        expected = "a finite number" if least is None else f"a finite number >= {least:g}"
        raise error(field, float(values[tuple(at)]), expected, fix, row=at[0], token=at[1] if len(at) > 1 else None)
    return values
