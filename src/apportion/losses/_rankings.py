"""Shared parts of losses on rankings: their checks, and the pairs inside each prompt."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from apportion.errors import DataError, unknown_name
from apportion.losses._ratios import upcast

TIES = ("skip", "half")
WEIGHTS = ("prompt", "pair")
FIX = "Give one entry a completion."


class Rankings(NamedTuple):
    """The judged completions of some prompts, sorted by prompt: M of the N that were given.

    Attributes:
        scores: (M,) float32 or float64, each less its margin. ranks: (M,).
        prompt: (M,) int64, 0 ... P−1. prompts: P.
        first, second: (Q,) int64 rows of `scores`: every ordered pair inside a prompt, a row with itself included.
    """

    scores: Tensor
    ranks: Tensor
    prompt: Tensor
    prompts: int
    first: Tensor
    second: Tensor


def rankings(scores: Tensor, groups: Tensor, ranks: Tensor, margins: Tensor | None, ties: str, weight: str) -> Rankings:
    """Return what the losses compare; rows whose rank is NaN take no part.

    Raises:
        ConfigError: `ties` or `weight` is no such name. DataError: shapes differ, a group is no whole number, a margin
            of a judged row is not finite.
    """
    if ties not in TIES:
        raise unknown_name("ties", str(ties), TIES)
    if weight not in WEIGHTS:
        raise unknown_name("weight", str(weight), WEIGHTS)
    given = {"groups": groups, "ranks": ranks} | ({} if margins is None else {"margins": margins})
    if scores.dim() != 1:
        raise DataError("scores", f"shape {tuple(scores.shape)}", "shape (N,)", FIX)
    for name, tensor in given.items():
        if tensor.shape != scores.shape:
            raise DataError(name, f"shape {tuple(tensor.shape)}", f"shape {tuple(scores.shape)}, as scores", FIX)
    if groups.is_floating_point() or groups.is_complex() or groups.dtype == torch.bool:
        raise DataError("groups", str(groups.dtype), "int64, a number a prompt", "Number the prompts.")
    judged = (ranks == ranks).nonzero()[:, 0]  # NaN is not itself
    order = judged[groups[judged].argsort(stable=True)]
    _, prompt, sizes = groups[order].unique_consecutive(return_inverse=True, return_counts=True)
    own = upcast(scores[order])
    if margins is not None:
        if not bool(margins[order].isfinite().all()):
            raise DataError("margins", "one that is not finite", "a finite number a judged completion", FIX)
        own = own - margins[order].to(own.dtype)
    first, second = ordered_pairs(sizes)
    return Rankings(own, ranks[order], prompt, len(sizes), first, second)


def ordered_pairs(sizes: Tensor) -> tuple[Tensor, Tensor]:
    """Return (first, second), each (ΣK²,) int64: all ordered pairs of rows inside groups of `sizes` (P,) rows.

    The rows of a group follow one another. A row is paired with itself as well.
    """
    per_row = sizes.repeat_interleave(sizes)  # (M,) the size of each row's group
    start = (sizes.cumsum(0) - sizes).repeat_interleave(sizes)  # (M,) the first row of each row's group
    first = torch.arange(len(per_row), device=sizes.device).repeat_interleave(per_row)
    within = torch.arange(len(first), device=sizes.device) - (per_row.cumsum(0) - per_row)[first]
    return first, start[first] + within


def decided(given: Rankings, ties: str) -> Tensor:
    """Return (Q,) bool: the ordered pairs whose first row counts as the winner; both orders of a tie under "half"."""
    above = given.ranks[given.first] < given.ranks[given.second]
    if ties == "skip":
        return above
    return above | ((given.ranks[given.first] == given.ranks[given.second]) & (given.first != given.second))


def pair_shares(given: Rankings, chosen: Tensor) -> Tensor:
    """Return what each of the ordered pairs `chosen` (R,) counts: 1, and ½ for either order of a tie, (R,)."""
    tied = given.ranks[given.first[chosen]] == given.ranks[given.second[chosen]]
    return torch.where(tied, 0.5, 1.0).to(given.scores.dtype)


def pairs_by_prompt(given: Rankings, chosen: Tensor, shares: Tensor) -> Tensor:
    """Return the number of pairs of each prompt, (P,)."""
    return shares.new_zeros(given.prompts).index_add(0, given.prompt[given.first[chosen]], shares)
