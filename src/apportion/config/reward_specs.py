"""The rewards of a run as its settings name them: what each is, its weight, its normalisation. Imports no torch."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any, NamedTuple

from apportion.errors import ConfigError
from apportion.registry import parse

RULES = ("exact", "json", "math", "regex", "tests")  # docs/rewards.md; apportion.rewards has one file each
NORMALISE = ("batch", "group")
FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
FILE = re.compile(r"(?P<path>.+)\.py:(?P<function>[A-Za-z_]\w*)")  # which is no name of a module
LABEL = re.compile(r"[\w.:-]+")
EXAMPLE = "Example: [json, {my_rewards:short: {weight: 0.5}}]."


class RewardSpec(NamedTuple):
    """One reward of a run.

    Attributes:
        kind: "model", "function" or "rule". source: a folder or hub id, "package.module:function", or a rule's name.
        name: its name in logs. weight: its factor in the sum. normalise: over what it is standardised first, or None.
        settings: those of a rule.
    """

    kind: str
    source: str
    name: str
    weight: float
    normalise: str | None
    settings: Mapping[str, Any]


def reward_specs(reward_model: str | None, rewards: Any, field: str = "rewards") -> list[RewardSpec]:
    """Return the rewards of a run from its settings `reward_model` and `rewards`; none of them opened.

    Args:
        field: the setting that `rewards` is from, for errors.

    Raises:
        ConfigError: both or neither are given, a shape that is no list of rewards, a common setting of another type, or
            one name twice.
    """
    if rewards is None:
        if not reward_model:
            expected = "a folder or hub id of a sequence classifier, or rewards"
            fix = "Train one with `apportion reward` and pass --reward_model runs/reward/final, or see docs/rewards.md."
            raise ConfigError("reward_model", reward_model, expected, fix)
        return [RewardSpec("model", reward_model, "reward_model", 1.0, None, {})]
    if reward_model:
        fix = f"Write --rewards '[{reward_model}, …]': a reward model is one of the rewards."
        raise ConfigError("reward_model", reward_model, "null where rewards are given", fix)
    specs = [_spec(source, settings, field) for source, settings in _pairs(rewards, field)]
    names = [spec.name for spec in specs]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ConfigError(field, names, "a name of its own for each", f"Set `name:` of one {twice}.")
    return specs


def reward_models(specs: Sequence[RewardSpec]) -> list[RewardSpec]:
    """Return those that are reward models; evidence such as attention comes from the first."""
    return [spec for spec in specs if spec.kind == "model"]


def reward_path(config: Any) -> str | None:
    """Return the folder or hub id of the first reward model of a stage's settings, None without one."""
    models = reward_models(reward_specs(config.reward_model, getattr(config, "rewards", None)))
    return models[0].source if models else None


def _pairs(rewards: Any, field: str) -> list[tuple[str, dict[str, Any]]]:
    try:
        pairs = parse(field, rewards)
    except ConfigError as error:
        expected = "a reward model, a package.module:function, a rule, or a list of these"
        raise ConfigError(field, error.got, expected, EXAMPLE) from None
    if not all(source.strip() for source, _ in pairs):
        raise ConfigError(field, rewards, "names that are not blank", EXAMPLE)
    return pairs


def _check_file(source: str, rewards: str) -> None:
    """Raise ConfigError for a function that is named by its file."""
    named = FILE.fullmatch(source)
    if named is None:
        return
    path = PurePath(named["path"])
    module = path.name if path.is_absolute() else ".".join(part for part in path.parts if part != "..")
    start = f"PYTHONPATH={path.parent}" if path.is_absolute() else "the working folder or PYTHONPATH"
    fix = f"Write {module}:{named['function']}, a module that is imported from {start}."
    raise ConfigError(rewards, source, "package.module:function", fix)


def _spec(source: str, settings: dict[str, Any], rewards: str) -> RewardSpec:
    _check_file(source, rewards)
    kind = "rule" if source in RULES else "function" if FUNCTION.fullmatch(source) else "model"
    field, settings = f"{rewards}.{source}", dict(settings)
    weight, normalise = settings.pop("weight", 1.0), settings.pop("normalise", None)
    name = settings.pop("name", _label(kind, source))
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
        raise ConfigError(f"{field}.weight", weight, "a finite number", "1 counts it as it is, -1 is a penalty.")
    if normalise in (True, False):
        normalise = "batch" if normalise else None
    if normalise is not None and normalise not in NORMALISE:
        raise ConfigError(f"{field}.normalise", normalise, "batch, group or false", "docs/rewards.md tells them apart.")
    if not isinstance(name, str) or not LABEL.fullmatch(name):
        raise ConfigError(f"{field}.name", name, "letters, digits and . : - _", "Metrics are rewards/NAME/mean.")
    if settings and kind != "rule":
        known = "weight, normalise or name"
        what = "a function's settings are its own defaults" if kind == "function" else "no other settings"
        raise ConfigError(field, next(iter(settings)), f"{known}: {what}", "Remove it.")
    return RewardSpec(kind, source, name, float(weight), normalise, settings)


def _label(kind: str, source: str) -> str:
    """Return the name in logs of a reward that has none in the settings."""
    if kind == "rule":
        return source
    if kind == "function":
        return source.partition(":")[2]
    parts = [part for part in PurePath(source).parts if part not in ("final", "/", ".", "..")]
    return re.sub(r"[^\w.:-]", "_", parts[-1]) if parts else "reward_model"
