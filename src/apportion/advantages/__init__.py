"""Advantage estimators: (rewards, segments, rollouts) -> raw advantages and returns (B,T)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from apportion import registry
from apportion.advantages.gae import gae
from apportion.advantages.group_relative import group_relative
from apportion.advantages.leave_one_out import leave_one_out
from apportion.advantages.monte_carlo import monte_carlo
from apportion.advantages.reinforce_pp import reinforce_pp
from apportion.advantages.vine import vine
from apportion.types import Estimator

METHODS: Mapping[str, Callable[..., Estimator]] = {
    f.__name__: f for f in (gae, group_relative, leave_one_out, monte_carlo, reinforce_pp, vine)
}
__all__ = [
    "METHODS",
    "build",
    "find",
    "gae",
    "group_relative",
    "leave_one_out",
    "monte_carlo",
    "names",
    "reinforce_pp",
    "vine",
]


def names() -> tuple[str, ...]:
    """Return the built-in estimators' names."""
    return tuple(METHODS)


def find(name: str) -> Callable[..., Estimator]:
    """Return the estimator factory of that name, or "package.module:function". Raises ConfigError."""
    return registry.find("advantages", name, METHODS)


def build(specs: list[tuple[str, dict[str, Any]]]) -> Estimator:
    """Return the estimator of exactly one (name, keyword arguments) pair."""
    name, kwargs = registry.single("advantages", specs)
    method: Estimator = registry.check_method("advantages", name, registry.call("advantages", name, find(name), kwargs))
    return method
