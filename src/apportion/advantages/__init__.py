"""How do returns become advantages? Estimators: (rewards, segments, rollouts) -> raw advantages and returns (B,T)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from apportion import registry
from apportion.advantages.gae import gae
from apportion.types import Estimator

METHODS: Mapping[str, Callable[..., Estimator]] = {f.__name__: f for f in (gae,)}
__all__ = ["METHODS", "build", "find", "gae", "names"]


def names() -> tuple[str, ...]:
    """Return the built-in estimators' names."""
    return tuple(METHODS)


def find(name: str) -> Callable[..., Estimator]:
    """Return the estimator factory of that name, or "package.module:function". Raises ConfigError."""
    return registry.find("advantages", name, METHODS)


def build(specs: list[tuple[str, dict[str, Any]]]) -> Estimator:
    """Return the estimator of exactly one (name, keyword arguments) pair."""
    name, kwargs = registry.single("advantages", specs)
    return registry.method("advantages", name, registry.call("advantages", name, find(name), kwargs))
