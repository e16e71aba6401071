"""From "which tokens start an action" to ids: numbering, turns, evidence, and the check of anyone's ids."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from apportion.errors import ConfigError, DataError
from apportion.types import Rollouts

AROUND = 3  # ids shown on each side of the one that is wrong


class Cut:
    """A segmenter made of `starts(rollouts)` (B,T) bool, True where a token starts an action.

    Each row's first token and the first of each turn start one whatever it says; what stands off the mask is ignored.
    """

    def __init__(self, starts: Callable[[Rollouts], Tensor], needs: frozenset[str] = frozenset()) -> None:
        self.starts, self.needs = starts, needs

    def __call__(self, rollouts: Rollouts) -> Tensor:
        return number(self.starts(rollouts), rollouts.mask, rollouts.turn)


def number(starts: Tensor, mask: Tensor, turn: Tensor | None = None) -> Tensor:
    """Return (B,T) int64 ids from 0 along each row, one more at each start, -1 off the mask; never across a turn."""
    begins = mask & (starts | turn_starts(mask, turn))
    return torch.where(mask, begins.cumsum(dim=1) - 1, -1)


def order(mask: Tensor) -> Tensor:
    """Return (B,T) int64: how many of the row's tokens come before this one. Holes do not count."""
    return mask.cumsum(dim=1) - mask.long()


def turn_starts(mask: Tensor, turn: Tensor | None) -> Tensor:
    """Return (B,T) bool, True on each row's first token and on the first token of each turn. `turn` (B,T) or None."""
    before = previous(mask)
    first = mask & (before < 0)
    if turn is None:
        return first
    return first | (mask & (turn != turn.gather(1, before.clamp_min(0))))


def previous(mask: Tensor) -> Tensor:
    """Return (B,T) int64: the index of the last masked token before this one, -1 where there is none."""
    columns = torch.arange(mask.shape[1], device=mask.device).expand(mask.shape)
    if not mask.shape[1]:
        return columns
    latest = torch.where(mask, columns, -1).cummax(dim=1).values
    return torch.cat([latest.new_full((len(mask), 1), -1), latest[:, :-1]], dim=1)


def order_in_turn(mask: Tensor, turn: Tensor | None) -> Tensor:
    """Return (B,T) int64: how many tokens of the same turn come before this one; any number off the mask."""
    place = order(mask)
    if not mask.shape[1]:
        return place
    return place - torch.where(turn_starts(mask, turn), place, 0).cummax(dim=1).values


def positive_int(field: str, value: Any) -> int:
    """Return `value` if it is a whole number of at least 1; raise ConfigError that names `field` otherwise."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(field, value, "a whole number of at least 1", "Count tokens.")
    return value


def numbers(rollouts: Rollouts, name: str) -> Tensor:
    """Return evidence `name` (B,T) in float32, 0 off the mask.

    Raises:
        DataError: it is absent, of another shape, or not finite on the mask.
    """
    found = _shaped(rollouts, name, name)
    values = torch.where(rollouts.mask, found.float(), 0.0)
    bad = ~torch.isfinite(values)
    if bad.any():
        row, at = bad.nonzero()[0].tolist()
        got = values[row, at].item()
        raise DataError(f"evidence[{name!r}]", got, "a finite number", "Check the model.", row=row, token=at)
    return values


def flags(rollouts: Rollouts, name: str) -> Tensor:
    """Return evidence `name`, or "boundaries" where that is absent, as (B,T) bool, False off the mask.

    Raises:
        DataError: both are absent, or it is neither bool nor 0 and 1, or of another shape.
    """
    held = name if name in rollouts.evidence or "boundaries" not in rollouts.evidence else "boundaries"
    found = torch.where(rollouts.mask, _shaped(rollouts, held, f"{name} or boundaries").float(), 0.0)
    bad = (found != 0) & (found != 1)
    if bad.any():
        row, at = bad.nonzero()[0].tolist()
        got, expected = found[row, at].item(), "True or False (1 or 0)"
        raise DataError(f"evidence[{held!r}]", got, expected, "Mark each first token True.", row=row, token=at)
    return found.bool()


def _shaped(rollouts: Rollouts, name: str, wanted: str) -> Tensor:
    """Return evidence `name`, checked to be there and of the mask's shape."""
    shape = tuple(rollouts.mask.shape)
    if name not in rollouts.evidence:
        got = sorted(rollouts.evidence) or "no evidence"
        raise DataError(f"evidence[{name!r}]", got, f"{wanted}, (B,T) = {shape}", "Produce it in scoring.")
    found = rollouts.evidence[name]
    if tuple(found.shape) != shape:
        fix = "Give one value a response token."
        raise DataError(f"evidence[{name!r}]", tuple(found.shape), f"(B,T) = {shape}", fix)
    return found


def check(ids: Tensor, mask: Tensor, turn: Tensor | None = None) -> Tensor:
    """Return `ids` if they are what a segmenter must give: (B,T) int64, -1 exactly off the mask, from 0 along each
    row, each the same as the one before or one more, and (where `turn` (B,T) is given) no id in two turns.

    Raises:
        DataError: they are not; it names the first row and token that is wrong, and shows the ids around it.
    """
    if not isinstance(ids, Tensor) or ids.dtype != torch.int64 or ids.shape != mask.shape:
        got = f"{ids.dtype} {tuple(ids.shape)}" if isinstance(ids, Tensor) else type(ids).__name__
        raise DataError("segments", got, f"int64 (B,T) = {tuple(mask.shape)}", "Return one id a token.")
    before = previous(mask)
    last = torch.where(before < 0, -1, ids.gather(1, before.clamp_min(0))) if ids.shape[1] else ids
    first = mask & (before < 0)
    crossed = turn_starts(mask, turn) & ~first & (ids == last)
    clauses = (
        (~mask & (ids != -1), "-1 off the mask", "Put -1 where the mask is False."),
        (mask & (ids < 0), "an id from 0 on the mask", "Give every token of the mask an id."),
        (first & (ids != 0), "0 on the row's first token", "Count from 0 in every row."),
        (mask & (ids < last), "ids that never fall along a row", "Sort the boundaries: an action is a run of tokens."),
        (mask & (ids > last + 1), "the id before it or one more", "Leave no id out."),
        (crossed, "another id in another turn", "Start an action where `rollouts.turn` changes."),
    )
    worst = torch.stack([clause[0] for clause in clauses]).any(dim=0)
    if not worst.any():
        return ids
    row, at = worst.nonzero()[0].tolist()
    expected, fix = next(text for wrong, *text in clauses if wrong[row, at])
    low, high = max(0, at - AROUND), at + AROUND + 1
    shown = {"ids": ids[row, low:high].tolist(), "mask": mask[row, low:high].int().tolist(), "from token": low}
    raise DataError("segments", shown, expected, fix, row=row, token=at)
