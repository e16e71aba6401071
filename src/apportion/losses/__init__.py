"""Policy, value and preference losses: sums over a batch, which the caller divides by the declared denominator."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from apportion import registry
from apportion.errors import ConfigError
from apportion.losses._ratios import Sums, entropy_of
from apportion.losses.bradley_terry import bradley_terry
from apportion.losses.cispo import cispo
from apportion.losses.dapo import dapo, overlong_penalty
from apportion.losses.dpo import dpo
from apportion.losses.dr_grpo import dr_grpo
from apportion.losses.grpo import grpo
from apportion.losses.gspo import gspo
from apportion.losses.plackett_luce import plackett_luce
from apportion.losses.ppo import clipped_policy, ppo
from apportion.losses.reinforce import reinforce
from apportion.losses.value import clipped_value
from apportion.types import PolicyLoss

METHODS: Mapping[str, Callable[..., PolicyLoss]] = {
    f.__name__: f for f in (ppo, grpo, dr_grpo, dapo, gspo, cispo, reinforce)
}
PREFERENCES: Mapping[str, Callable[..., tuple[Tensor, Tensor]]] = {
    f.__name__: f for f in (bradley_terry, plackett_luce)
}
__all__ = [
    "METHODS",
    "PREFERENCES",
    "Sums",
    "bradley_terry",
    "build",
    "cispo",
    "clipped_policy",
    "clipped_value",
    "dapo",
    "dpo",
    "dr_grpo",
    "entropy_of",
    "find",
    "grpo",
    "gspo",
    "names",
    "overlong_penalty",
    "plackett_luce",
    "ppo",
    "reinforce",
]


def names() -> tuple[str, ...]:
    """Return the built-in policy losses' names."""
    return tuple(METHODS)


def find(name: str) -> Callable[..., PolicyLoss]:
    """Return the loss factory of that name, or "package.module:function". Raises ConfigError with suggestions."""
    return registry.find("loss", name, METHODS)


def build(specs: list[tuple[str, dict[str, Any]]]) -> PolicyLoss:
    """Return the policy loss of exactly one (name, keyword arguments) pair.

    Raises:
        ConfigError: several, an unknown name or key, a value out of range, or a function that returns no PolicyLoss.
    """
    name, kwargs = registry.single("loss", specs)
    loss = registry.call("loss", name, find(name), kwargs)
    if not isinstance(loss, PolicyLoss):
        fix = "Return apportion.types.PolicyLoss(terms, denominator, ratio, needs)."
        raise ConfigError("loss", f"{name}, which returned a {type(loss).__name__}", "a PolicyLoss", fix)
    return loss
