"""Shared parts of segmenters: from the tokens that start an action to ids, turns, and the validation of ids."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from apportion.errors import DataError
from apportion.masking import previous_index
from apportion.types import Rollouts

CONTEXT = 3  # ids shown on each side of the invalid one


class BoundarySegmenter:
    """A segmenter defined by `starts(rollouts)` (B,T) bool, True where a token starts an action.

    Each row's first token and the first of each turn always start one; entries off the mask are ignored.
    """

    def __init__(self, starts: Callable[[Rollouts], Tensor], needs: frozenset[str] = frozenset()) -> None:
        self.starts, self.needs = starts, needs

    def __call__(self, rollouts: Rollouts) -> Tensor:
        return number_actions(self.starts(rollouts), rollouts.mask, rollouts.turn)


def number_actions(starts: Tensor, mask: Tensor, turn: Tensor | None = None) -> Tensor:
    """Return (B,T) int64 ids from 0 along each row, one more at each start, -1 off the mask; never across a turn."""
    begins = mask & (starts | turn_starts(mask, turn))
    return torch.where(mask, begins.cumsum(dim=1) - 1, -1)


def order(mask: Tensor) -> Tensor:
    """Return (B,T) int64: the number of the row's tokens before this one. Holes do not count."""
    return mask.cumsum(dim=1) - mask.long()


def turn_starts(mask: Tensor, turn: Tensor | None) -> Tensor:
    """Return (B,T) bool, True on each row's first token and on the first token of each turn. `turn` (B,T) or None."""
    before = previous_index(mask)
    first = mask & (before < 0)
    if turn is None:
        return first
    return first | (mask & (turn != turn.gather(1, before.clamp_min(0))))


def order_in_turn(mask: Tensor, turn: Tensor | None) -> Tensor:
    """Return (B,T) int64: the number of tokens of the same turn before this one; undefined off the mask."""
    place = order(mask)
    if not mask.shape[1]:
        return place
    return place - torch.where(turn_starts(mask, turn), place, 0).cummax(dim=1).values


def boundary_flags(rollouts: Rollouts, name: str) -> Tensor:
    """Return evidence `name`, or "boundaries" where that is absent, as (B,T) bool, False off the mask.

    Raises:
        DataError: both are absent, or it is neither bool nor 0 and 1, or of another shape.
    """
    name = name if name in rollouts.evidence or "boundaries" not in rollouts.evidence else "boundaries"
    fix = "Mark the first token of each action True, the others False."
    values = rollouts.token_evidence(name, fix=fix)
    wrong = (values != 0) & (values != 1)
    if wrong.any():
        row, at = wrong.nonzero()[0].tolist()
        expected = "True or False (1 or 0)"
        raise DataError(f"evidence[{name!r}]", values[row, at].item(), expected, fix, row=row, token=at)
    return values.bool()


def check(ids: Tensor, mask: Tensor, turn: Tensor | None = None) -> Tensor:
    """Return `ids` if they are a valid segmentation: (B,T) int64, -1 exactly off the mask, from 0 along each row, each
    equal to the one before or one more, and (where `turn` (B,T) is given) no id in two turns.

    Raises:
        DataError: they are not; it names the first invalid row and token, and shows the ids around it.
    """
    if not isinstance(ids, Tensor) or ids.dtype != torch.int64 or ids.shape != mask.shape:
        got = f"{ids.dtype} {tuple(ids.shape)}" if isinstance(ids, Tensor) else type(ids).__name__
        raise DataError("segments", got, f"int64 (B,T) = {tuple(mask.shape)}", "Return one id a token.")
    before = previous_index(mask)
    last = torch.where(before < 0, -1, ids.gather(1, before.clamp_min(0))) if ids.shape[1] else ids
    first = mask & (before < 0)
    crossed = turn_starts(mask, turn) & ~first & (ids == last)
    clauses = (
        (~mask & (ids != -1), "-1 off the mask", "Put -1 where the mask is False."),
        (mask & (ids < 0), "an id from 0 on the mask", "Give every token of the mask an id."),
        (first & (ids != 0), "0 on the row's first token", "Count from 0 in every row."),
        (mask & (ids < last), "ids that never fall along a row", "An action is a run of consecutive tokens."),
        (mask & (ids > last + 1), "the id before it or one more", "Do not skip ids."),
        (crossed, "another id in another turn", "Start an action where `rollouts.turn` changes."),
    )
    invalid = torch.stack([clause[0] for clause in clauses]).any(dim=0)
    if not invalid.any():
        return ids
    row, at = invalid.nonzero()[0].tolist()
    expected, fix = next(text for wrong, *text in clauses if wrong[row, at])
    low, high = max(0, at - CONTEXT), at + CONTEXT + 1
    shown = {"ids": ids[row, low:high].tolist(), "mask": mask[row, low:high].int().tolist(), "from token": low}
    raise DataError("segments", shown, expected, fix, row=row, token=at)
