"""The method of a reinforcement-learning run, and the credits logged beside it; built before any model is loaded."""

from __future__ import annotations

from collections.abc import Iterable

from apportion import algorithms, credit, registry
from apportion.compatibility import resolve_defaults
from apportion.config import RLConfig
from apportion.evidence import plan
from apportion.types import Credit, Method
from apportion.user_code import guard_credit


def build_method(config: RLConfig) -> Method:
    """Return the choices of a run, checked, and put the method's own value where a setting of `config` is null.

    Raises:
        ConfigError: an unknown name, a bad setting, or a combination that means nothing. Loads no model.
    """
    method = algorithms.build(
        config.algorithm,
        credit_spec=config.credit,
        segments_spec=config.segments,
        advantages_spec=config.advantages,
        loss_spec=config.loss,
    )
    plan(method.needs.union(*(compared.needs for compared in comparisons(config.compare).values())))
    resolve_defaults(config, method)
    return method


def comparisons(names: Iterable[str]) -> dict[str, Credit]:
    """Return the credit methods to log beside the trained one, by name. Raises ConfigError."""
    for name in names:
        registry.find("compare", name, credit.METHODS)  # an unknown one is an error of this setting
    return {name: guard_credit(name, credit.make(name, {})) for name in names}
