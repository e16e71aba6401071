"""Actions of random lengths: the randomised n-grams of MA-RLHF, drawn from each response itself."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from apportion.errors import ConfigError
from apportion.segments._boundaries import Cut, order, positive_int
from apportion.types import Rollouts, Segmenter

# the odd constants of splitmix64 (Steele et al. 2014), as signed 64-bit integers
STEP, FIRST, SECOND = -0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15


def random_ngrams(lengths: Sequence[int] = (2, 3, 5, 10), seed: int = 0) -> Segmenter:
    """Return the segmenter that cuts each row into actions of random `lengths`, (B,T) int64.

    `lengths` is repeated until its sum covers the row's tokens, and then shuffled; the last action takes what is left.
    The shuffle of a row depends on `seed` and the row's ids on the mask alone: the same response is cut in the same
    way in any batch, at any padding, on any device, and nothing has to be kept to go on after an interruption. An
    action that runs over a turn's end is cut there.

    Args:
        lengths: tokens of an action, each at least 1; a length named twice is drawn twice as often.
        seed: another one gives other cuts.

    Raises:
        ConfigError: no length, one below 1, or a seed that is not a whole number.

    Source: Chai et al. 2024 (arXiv 2410.02743), section 3.2.1 and appendix B.4.

    Assumes: no length of an action is better than another.
    Use it when a fixed n might line up with the text; lengths are mixed instead.
    """
    if isinstance(lengths, (str, int)) or not list(lengths):
        raise ConfigError("random_ngrams.lengths", lengths, "a list of lengths", "Example: [2, 3, 5, 10].")
    sizes = [positive_int("random_ngrams.lengths", n) for n in lengths]
    if isinstance(seed, bool) or not isinstance(seed, int) or not -(2**63) <= seed < 2**63:
        raise ConfigError("random_ngrams.seed", seed, "a whole number of 64 bits", "Example: 0.")

    def starts(rollouts: Rollouts) -> Tensor:
        mask = rollouts.mask
        place = order(mask)
        ends = _shuffled(sizes, mask.sum(dim=1), _row_seeds(rollouts.response_ids, mask, place, seed)).cumsum(dim=1)
        mine = torch.searchsorted(ends, place, right=True)  # which drawn length a token falls in
        begin = torch.where(mine == 0, 0, ends.gather(1, (mine - 1).clamp(0, ends.shape[1] - 1)))
        return place == begin

    return Cut(starts)


def _shuffled(sizes: list[int], count: Tensor, seeds: Tensor) -> Tensor:
    """Return (B,N): each row's repeated `sizes` in random order, zeros after those that its `count` (B,) needs."""
    longest = int(count.max()) if len(count) else 0
    repeats = -(-longest // sum(sizes)) or 1
    drawn = torch.tensor(sizes, device=count.device).repeat(repeats)
    columns = torch.arange(len(drawn), device=count.device)
    keys = _mix(seeds[:, None] + (columns + 1) * STEP) & torch.iinfo(torch.int64).max
    unused = columns >= (-(-count // sum(sizes)) * len(sizes))[:, None]
    # a stable sort: unused ones have the highest columns, so that they stay behind even a key as high as theirs
    at = keys.masked_fill(unused, torch.iinfo(torch.int64).max).argsort(dim=1, stable=True)
    return torch.where(unused.gather(1, at), 0, drawn[at])


def _row_seeds(ids: Tensor, mask: Tensor, place: Tensor, seed: int) -> Tensor:
    """Return (B,) int64 that depends on `seed` and on each row's ids in their order on the mask."""
    each = _mix(_mix(ids) + (place + 1) * STEP)
    start = torch.full((len(ids),), seed, dtype=torch.int64, device=ids.device)
    return _mix(_mix(start) + torch.where(mask, each, 0).sum(dim=1))


def _mix(x: Tensor) -> Tensor:
    """Return splitmix64's scramble of `x` int64: integers alone, so that every device gives the same bits."""
    x = (x ^ _shift(x, 30)) * FIRST
    x = (x ^ _shift(x, 27)) * SECOND
    return x ^ _shift(x, 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    """Return `x` shifted right with zeros coming in; torch's shift of int64 repeats the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
