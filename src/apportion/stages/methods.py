"""The three choices of a run, built and checked before any model library is loaded."""

from __future__ import annotations

from apportion import algorithms
from apportion.algorithms import Method
from apportion.config import RLConfig
from apportion.evidence import plan
from apportion.stages.records import comparisons


def build_method(config: RLConfig) -> Method:
    """Return the three choices of a run, checked, and settle what `ppo.truncated` means when it is not said.

    Raises:
        ConfigError: an unknown name, a bad setting, or a combination that means nothing. Loads no model.
    """
    method = algorithms.build(
        config.algorithm,
        credit_spec=config.credit,
        segments_spec=config.segments,
        advantages_spec=config.advantages,
    )
    plan(method.needs.union(*(compared.needs for compared in comparisons(config.compare).values())))
    if config.ppo.truncated is None:
        config.ppo.truncated = "terminal" if config.sampling.stop == "length" else "bootstrap"
    return method
