"""Which attention weights of a forward pass a credit uses: layers, reduction over heads, or the attention rollout."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from apportion.errors import ConfigError, check_flag, unknown_name
from apportion.registry import EvidenceKey

REWARD_ATTENTION = "reward_attention"
HEADS = ("mean", "max")
Layers = str | int | Sequence[int]


class AttentionSpec(NamedTuple):
    """Layers and heads that are reduced to one attention row, or the rollout over all layers.

    Made by `attention_spec`, which validates and normalises: layers are "last", "all" or a tuple of numbers, −1 the
    last. `exclude_self` leaves out the attention of the position that reads the score to itself.
    """

    layers: str | tuple[int, ...] = "last"
    heads: str = "mean"
    rollout: bool = False
    exclude_self: bool = False

    @property
    def evidence(self) -> str:
        """The name of this attention of the reward model as evidence; the default has no settings."""
        settings: dict[str, Any] = {"exclude_self": True} if self.exclude_self else {}
        if self.rollout:
            settings |= {"rollout": True}
        elif (self.layers, self.heads) != ("last", "mean"):
            settings |= {"heads": self.heads, "layers": self.layers}
        return EvidenceKey(REWARD_ATTENTION, **settings) if settings else REWARD_ATTENTION


def check_layers(field: str, layers: Layers) -> str | tuple[int, ...]:
    """Return "last", "all" or a tuple of distinct layer numbers in order. Raises ConfigError for anything else."""
    if isinstance(layers, str):
        if layers not in ("last", "all"):
            raise unknown_name(field, layers, ("last", "all"))
        return layers
    numbers: list[Any] = list(layers) if isinstance(layers, (Sequence, set, frozenset)) else [layers]
    if not numbers or any(isinstance(n, bool) or not isinstance(n, int) for n in numbers):
        expected = '"last", "all", a layer number or a list of them'
        raise ConfigError(field, layers, expected, "Use [-1, -2] for the last two layers.")
    return "last" if set(numbers) == {-1} else tuple(sorted(set(numbers)))


def attention_spec(
    layers: Layers = "last",
    heads: str = "mean",
    rollout: bool = False,
    exclude_self: bool = False,
    field: str = "attention",
) -> AttentionSpec:
    """Return the `AttentionSpec` of these settings.

    Raises:
        ConfigError: a setting outside its range, named `field`.layers and so on, or a rollout with a choice of layers
            or heads: it is defined over all layers and the mean of the heads.
    """
    chosen = check_layers(f"{field}.layers", layers)
    if heads not in HEADS:
        raise unknown_name(f"{field}.heads", str(heads), HEADS)
    check_flag(f"{field}.rollout", rollout, "Leave it out for the last layer.")
    check_flag(f"{field}.exclude_self", exclude_self, "Leave it out to keep the whole row.")
    if rollout and (chosen not in ("last", "all") or heads != "mean"):
        got = f"true with layers={layers!r} and heads={heads!r}"
        fix = "Leave layers and heads out, or set rollout to false."
        raise ConfigError(f"{field}.rollout", got, "all layers and the mean of the heads", fix)
    return AttentionSpec(*(("last", "mean") if rollout else (chosen, heads)), rollout, exclude_self)


def requested_attention(need: str) -> AttentionSpec:
    """Return the `AttentionSpec` that evidence `need` requests: the inverse of `AttentionSpec.evidence`."""
    return attention_spec(**EvidenceKey.of(need).settings)
