"""Which attention a credit reads: layers, heads or the rollout, and the name under which it asks for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from apportion import registry
from apportion.errors import ConfigError, message, unknown_name

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
            raise ConfigError(unknown_name(field, layers, ("last", "all")))
        return layers
    numbers: list[Any] = list(layers) if isinstance(layers, (Sequence, set, frozenset)) else [layers]
    if not numbers or any(isinstance(n, bool) or not isinstance(n, int) for n in numbers):
        expected = '"last", "all", a layer\'s number or a list of them'
        raise ConfigError(message(field, layers, expected, "Use [-1, -2] for the last two layers."))
    return "last" if set(numbers) == {-1} else tuple(sorted(set(numbers)))


def reading(layers: Layers = "last", heads: str = "mean", rollout: bool = False, field: str = "attention") -> Reading:
    """Return the `Reading` of these settings.

    Raises:
        ConfigError: a setting outside its range, named `field`.layers and so on, or a rollout over chosen layers or
            heads: it is defined over all layers with the heads' mean.
    """
    chosen = check_layers(f"{field}.layers", layers)
    if heads not in HEADS:
        raise ConfigError(unknown_name(f"{field}.heads", str(heads), HEADS))
    if not isinstance(rollout, bool):
        raise ConfigError(message(f"{field}.rollout", rollout, "true or false", "Leave it out for the last layer."))
    if rollout and (chosen not in ("last", "all") or heads != "mean"):
        came = f"true with layers={layers!r} and heads={heads!r}"
        mend = "Leave layers and heads out, or set rollout to false."
        raise ConfigError(message(f"{field}.rollout", came, "all layers and the heads' mean", mend))
    return Reading(rollout=True) if rollout else Reading(chosen, heads)


def asked_reading(name: str) -> Reading:
    """Return the `Reading` that evidence `name` asks for: what `Reading.evidence` wrote."""
    return reading(**registry.asked(name)[1])
