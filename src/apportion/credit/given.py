"""Evidence as a credit reads it: by name, of the right shape, finite, in float32, and 0 off the mask."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from apportion.errors import ConfigError, DataError, message
from apportion.masking import first_index, last_index
from apportion.types import Rollouts


def token_evidence(rollouts: Rollouts, name: str) -> Tensor:
    """Return evidence `name` (B,T) of any sign in float32, 0 off the mask.

    Raises:
        DataError: it is absent, not (B,T), or not finite on the mask; it names the rollout.
    """
    found = _take(rollouts, name, tuple(rollouts.mask.shape))
    # `where`, not a product: what stands off the mask may be anything, NaN included
    return _finite(torch.where(rollouts.mask, found, 0.0), name)


def row_evidence(rollouts: Rollouts, name: str) -> Tensor:
    """Return evidence `name` (B,) in float32, 0 on rows without tokens. Raises DataError as `token_evidence` does."""
    found = _take(rollouts, name, (len(rollouts),))
    return _finite(torch.where(rollouts.mask.any(dim=1), found, 0.0), name)


def _take(rollouts: Rollouts, name: str, shape: tuple[int, ...]) -> Tensor:
    field, expected = f"evidence[{name!r}]", f"a tensor {shape}"
    if name not in rollouts.evidence:
        came = sorted(rollouts.evidence) or "no evidence"
        raise DataError(message(field, came, expected, "Produce it in scoring, or pass it with `with_evidence`."))
    found = rollouts.evidence[name]
    if tuple(found.shape) != shape:
        raise DataError(message(field, tuple(found.shape), expected, "Check its producer."))
    return found.float()


def _finite(values: Tensor, name: str) -> Tensor:
    bad = ~torch.isfinite(values.reshape(len(values), values[:1].numel())).all(dim=1)
    if bad.any():
        row = int(bad.nonzero()[0])
        raise DataError(
            message(f"evidence[{name!r}] of rollout {row}", values[row].tolist(), "finite numbers", "Check its source.")
        )
    return values


def previous(values: Tensor, mask: Tensor, start: Tensor | float = 0.0) -> Tensor:
    """Return (B,T): the entry of `values` (B,T) at the token before, `start` ((B,1) or a number) on each row's first.

    "Before" skips holes. Off the mask the result means nothing.
    """
    steps = torch.arange(mask.shape[1], device=mask.device)
    upto = torch.where(mask, steps, -1).cummax(dim=1).values
    index = torch.nn.functional.pad(upto, (1, 0), value=-1)[:, :-1]
    return torch.where(index < 0, start, values.gather(1, index.clamp_min(0)))


def is_last(mask: Tensor) -> Tensor:
    """Return (B,T) bool, True on each row's last token."""
    return mask & (torch.arange(mask.shape[1], device=mask.device) == last_index(mask)[:, None])


def is_first(mask: Tensor) -> Tensor:
    """Return (B,T) bool, True on each row's first token."""
    return mask & (torch.arange(mask.shape[1], device=mask.device) == first_index(mask)[:, None])


def check_number(field: str, value: object, least: float, mend: str = "See its docstring.") -> float:
    """Return `value` if it is a finite number >= `least`; raise ConfigError that names `field` otherwise."""
    good = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not good or value < least:  # type: ignore[operator]
        raise ConfigError(message(field, value, f"a finite number >= {least:g}", mend))
    return float(value)  # type: ignore[arg-type]
