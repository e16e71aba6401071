"""From the settings of rewards to sources: functions imported, rules built, reward models loaded last."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from apportion import registry
from apportion.config.reward_specs import RewardSpec, reward_models
from apportion.models.reward import RewardModel
from apportion.rewards.exact import exact
from apportion.rewards.function import FunctionSource
from apportion.rewards.json_schema import json_schema
from apportion.rewards.math_equality import math_equality
from apportion.rewards.mixture import Rewards
from apportion.rewards.model import ModelSource
from apportion.rewards.pattern import matches
from apportion.rewards.rule import Rule, RuleSource
from apportion.rewards.source import RewardSource
from apportion.rewards.unit_tests import unit_tests

RULE_FACTORIES: Mapping[str, Callable[..., Rule]] = {
    "exact": exact,
    "json": json_schema,
    "math": math_equality,
    "regex": matches,
    "tests": unit_tests,
}


def open_rewards(specs: Sequence[RewardSpec]) -> Rewards | None:
    """Return the rewards that `specs` name, without reward models; None where there is one reward model alone.

    Reward models after the first are added by `add_models` once they are loaded; the first one's score comes with the
    run's evidence.

    Raises:
        ConfigError: a function that cannot be imported, a rule's setting that cannot work, or a package or sandbox that
            a rule needs is not there.
    """
    if len(specs) == 1 and specs[0].kind == "model" and specs[0].weight == 1.0 and specs[0].normalise is None:
        return None
    sources: dict[str, RewardSource] = {}
    for spec in specs:
        if spec.kind == "function":
            sources[spec.name] = FunctionSource(spec.source)
        elif spec.kind == "rule":
            rule = registry.call("rewards", spec.source, RULE_FACTORIES[spec.source], spec.settings)
            sources[spec.name] = RuleSource(spec.name, rule)
    return Rewards(specs, sources)


def add_models(rewards: Rewards | None, loaded: Mapping[str, RewardModel]) -> None:
    """Add the reward models after the first to `rewards`, from {folder or hub id: the loaded model}."""
    if rewards is not None:
        for spec in reward_models(rewards.specs)[1:]:
            rewards.sources[spec.name] = ModelSource(spec.name, loaded[spec.source])
