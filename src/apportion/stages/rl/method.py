"""The method of a run: its credit, segments, estimator and loss, built before any model library is loaded."""

from __future__ import annotations

from apportion import algorithms
from apportion.compatibility import resolve_defaults
from apportion.config import RLConfig
from apportion.evidence import plan
from apportion.stages.rl.rollout_log import comparisons
from apportion.types import Method


def build_method(config: RLConfig) -> Method:
    """Return the method of a run and resolve the settings of `config` that are null.

    Raises:
        ConfigError: an unknown name, a bad setting, or a combination without meaning.
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
