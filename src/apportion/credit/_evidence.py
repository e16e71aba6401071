"""Evidence as credit methods read it: by name, validated, in float32, and 0 off the mask."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from apportion import registry
from apportion.errors import ConfigError, DataError, unknown_name
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
        got = sorted(rollouts.evidence) or "no evidence"
        raise DataError(field, got, expected, "Produce it in scoring, or pass it with `with_evidence`.")
    found = rollouts.evidence[name]
    if tuple(found.shape) != shape:
        raise DataError(field, tuple(found.shape), expected, "Check its producer.")
    return found.float()


def _finite(values: Tensor, name: str) -> Tensor:
    bad = ~torch.isfinite(values.reshape(len(values), values[:1].numel())).all(dim=1)
    if bad.any():
        row = int(bad.nonzero()[0])
        raise DataError(f"evidence[{name!r}]", values[row].tolist(), "finite numbers", "Check its source.", row=row)
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


def check_number(field: str, value: object, least: float, fix: str = "See its docstring.") -> float:
    """Return `value` if it is a finite number >= `least`; raise ConfigError that names `field` otherwise."""
    good = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not good or value < least:  # type: ignore[operator]
        raise ConfigError(field, value, f"a finite number >= {least:g}", fix)
    return float(value)  # type: ignore[arg-type]


EVIDENCE = "reward_attention"
HEADS = ("mean", "max")
Layers = str | int | Sequence[int]


class Reading(NamedTuple):
    """Which attention of a forward is read: the layers, how heads become one row, or the rollout over all layers.

    Made by `reading`, which checks and normalises: layers are "last", "all" or a tuple of numbers, −1 the last.
    """

    layers: str | tuple[int, ...] = "last"
    heads: str = "mean"
    rollout: bool = False

    @property
    def evidence(self) -> str:
        """The name under which this reading of the reward model is evidence; the paper's has no settings."""
        if self.rollout:
            return registry.ask(EVIDENCE, rollout=True)
        return EVIDENCE if self == Reading() else registry.ask(EVIDENCE, heads=self.heads, layers=self.layers)


def check_layers(field: str, layers: Layers) -> str | tuple[int, ...]:
    """Return "last", "all" or a tuple of distinct layer numbers in order. Raises ConfigError for anything else."""
    if isinstance(layers, str):
        if layers not in ("last", "all"):
            raise unknown_name(field, layers, ("last", "all"))
        return layers
    numbers: list[Any] = list(layers) if isinstance(layers, (Sequence, set, frozenset)) else [layers]
    if not numbers or any(isinstance(n, bool) or not isinstance(n, int) for n in numbers):
        expected = '"last", "all", a layer\'s number or a list of them'
        raise ConfigError(field, layers, expected, "Use [-1, -2] for the last two layers.")
    return "last" if set(numbers) == {-1} else tuple(sorted(set(numbers)))


def reading(layers: Layers = "last", heads: str = "mean", rollout: bool = False, field: str = "attention") -> Reading:
    """Return the `Reading` of these settings.

    Raises:
        ConfigError: a setting outside its range, named `field`.layers and so on, or a rollout over chosen layers or
            heads: it is defined over all layers with the heads' mean.
    """
    chosen = check_layers(f"{field}.layers", layers)
    if heads not in HEADS:
        raise unknown_name(f"{field}.heads", str(heads), HEADS)
    if not isinstance(rollout, bool):
        raise ConfigError(f"{field}.rollout", rollout, "true or false", "Leave it out for the last layer.")
    if rollout and (chosen not in ("last", "all") or heads != "mean"):
        got = f"true with layers={layers!r} and heads={heads!r}"
        fix = "Leave layers and heads out, or set rollout to false."
        raise ConfigError(f"{field}.rollout", got, "all layers and the heads' mean", fix)
    return Reading(rollout=True) if rollout else Reading(chosen, heads)


def asked_reading(name: str) -> Reading:
    """Return the `Reading` that evidence `name` asks for: what `Reading.evidence` wrote."""
    return reading(**registry.asked(name)[1])
