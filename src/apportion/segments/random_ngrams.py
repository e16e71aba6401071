"""Randomised n-grams of MA-RLHF: actions of random lengths, seeded by each response itself."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from apportion.errors import ConfigError, check_whole
from apportion.segments._boundaries import BoundarySegmenter, order
from apportion.types import Rollouts, Segmenter

# the odd constants of splitmix64 (Steele et al. 2014), as signed 64-bit integers
STEP, FIRST, SECOND = -0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15


def random_ngrams(lengths: Sequence[int] = (2, 3, 5, 10), seed: int = 0) -> Segmenter:
    """Return the segmenter that cuts each row into actions of random `lengths`, (B,T) int64.

    `lengths` is repeated until its sum covers the row's tokens, and then shuffled; the last action takes the remainder.
    The shuffle of a row depends only on `seed` and the row's ids on the mask: the same response is segmented equally
    in any batch, at any padding, on any device, and a resumed run needs no state. An action that crosses a turn's end
    is split there.

    Args:
        lengths: tokens of an action, each at least 1; a length listed twice occurs twice as often.
        seed: of the shuffles.

    Raises:
        ConfigError: no length, one below 1, or a seed that is not a whole number.

    Source: Chai et al. 2024 (arXiv 2410.02743), section 3.2.1 and appendix B.4.

    Assumes: no length of an action is better than another.
    Use it when a fixed n might align with the structure of the text.
    """
    if isinstance(lengths, (str, int)) or not list(lengths):
        raise ConfigError("random_ngrams.lengths", lengths, "a list of lengths", "Example: [2, 3, 5, 10].")
    sizes = [check_whole("random_ngrams.lengths", n, 1, "Count tokens.") for n in lengths]
    if isinstance(seed, bool) or not isinstance(seed, int) or not -(2**63) <= seed < 2**63:
        raise ConfigError("random_ngrams.seed", seed, "a whole number of 64 bits", "Example: 0.")

    def starts(rollouts: Rollouts) -> Tensor:
        mask = rollouts.mask
        place = order(mask)
        ends = _shuffled(sizes, mask.sum(dim=1), _row_seeds(rollouts.response_ids, mask, place, seed)).cumsum(dim=1)
        mine = torch.searchsorted(ends, place, right=True)  # the shuffled length that a token falls in
        begin = torch.where(mine == 0, 0, ends.gather(1, (mine - 1).clamp(0, ends.shape[1] - 1)))
        return place == begin

    return BoundarySegmenter(starts)


def _shuffled(sizes: list[int], count: Tensor, seeds: Tensor) -> Tensor:
    """Return (B,N): each row's repeated `sizes` in random order, zeros after those that cover its `count` (B,)."""
    longest = int(count.max()) if len(count) else 0
    repeats = -(-longest // sum(sizes)) or 1
    repeated = torch.tensor(sizes, device=count.device).repeat(repeats)
    columns = torch.arange(len(repeated), device=count.device)
    keys = _mix(seeds[:, None] + (columns + 1) * STEP) & torch.iinfo(torch.int64).max
    unused = columns >= (-(-count // sum(sizes)) * len(sizes))[:, None]
    # a stable sort: unused ones have the highest columns, so that they stay behind even a key as high as theirs
    at = keys.masked_fill(unused, torch.iinfo(torch.int64).max).argsort(dim=1, stable=True)
    return torch.where(unused.gather(1, at), 0, repeated[at])


def _row_seeds(ids: Tensor, mask: Tensor, place: Tensor, seed: int) -> Tensor:
    """Return (B,) int64 that depends on `seed` and on each row's ids in their order on the mask."""
    each = _mix(_mix(ids) + (place + 1) * STEP)
    start = torch.full((len(ids),), seed, dtype=torch.int64, device=ids.device)
    return _mix(_mix(start) + torch.where(mask, each, 0).sum(dim=1))


def _mix(x: Tensor) -> Tensor:
    """Return splitmix64's scramble of `x` int64: integer arithmetic, so that every device gives the same bits."""
    x = (x ^ _shift(x, 30)) * FIRST
    x = (x ^ _shift(x, 27)) * SECOND
    return x ^ _shift(x, 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    """Return `x` shifted right logically, with zeros; torch's shift of int64 is arithmetic."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
