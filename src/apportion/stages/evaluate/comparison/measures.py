"""Measures of answers: held-out rewards with their weighted sum, and judges, each of them once over all."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from apportion import registry
from apportion.config import EvaluateConfig, RewardSpec, reward_specs
from apportion.errors import ApportionError, ConfigError
from apportion.models.loading import locate
from apportion.rewards import Rewards, open_rewards
from apportion.stages.evaluate.comparison.entries import Entry

REWARD, JUDGE, SUM = "reward", "judge", "reward"
IMDB = "imdb"  # the judge of film reviews (`stages.evaluate.judge`), by name


@dataclass(frozen=True)
class Measure:
    """One reward or judge.

    Attributes:
        key: in evaluation.json: "reward", "reward/NAME" or "judge/NAME".
        spec: what it is; None for the judge of film reviews and for the sum of the rewards.
        rewards: its source, for functions and rules; of a reward model without any, which is loaded later.
        parts: of a sum, the keys of the rewards with their weights.
    """

    key: str
    spec: RewardSpec | None = None
    rewards: Rewards | None = None
    parts: tuple[tuple[str, float], ...] = ()

    @property
    def folder(self) -> str | None:
        """The folder or hub id of a reward model, None for anything else."""
        is_model = self.spec is not None and self.spec.kind == "model"
        return locate(self.setting, self.spec.source) if is_model and self.spec is not None else None

    @property
    def setting(self) -> str:
        """The setting that it is from."""
        return "judges" if self.key.startswith(JUDGE) else "rewards"


def open_measures(config: EvaluateConfig, entries: Sequence[Entry]) -> list[Measure]:
    """Return the measures in the order of the tables: the sum of the rewards, each of several, the judges.

    Raises:
        ConfigError: none are given and no run has rewards, a name twice, or what `open_rewards` refuses.
        ModelError: a reward model that is not there.
    """
    rewards, judges = _reward_specs(config, entries), _judge_specs(config)
    if not rewards and not judges:
        fix = "Add --rewards or --judges, such as --judges runs/reward/final."
        raise ConfigError("rewards", None, "a reward or a judge, since no policy is an rl run with rewards", fix)
    found = list[Measure]()
    if len(rewards) == 1 and rewards[0].weight == 1.0:
        found.append(_measure(SUM, rewards[0]))
    elif rewards:
        parts = [_measure(f"{REWARD}/{spec.name}", spec) for spec in rewards]
        weights = tuple((one.key, spec.weight) for one, spec in zip(parts, rewards, strict=True))
        found += [Measure(SUM, parts=weights), *parts]
    found += [Measure(f"{JUDGE}/{IMDB}") if spec is None else _measure(f"{JUDGE}/{spec.name}", spec) for spec in judges]
    for one in found:
        _ = one.folder  # raises where there is none
    return found


def _measure(key: str, spec: RewardSpec) -> Measure:
    opened = open_rewards([spec])
    return Measure(key, spec, Rewards([spec], {}) if opened is None else opened)


def _reward_specs(config: EvaluateConfig, entries: Sequence[Entry]) -> list[RewardSpec]:
    if config.rewards is not None:
        return reward_specs(None, config.rewards)
    for one in entries:
        if one.stage == "rl":
            return reward_specs(one.settings.get("reward_model"), one.settings.get("rewards"))
    return []


def _judge_specs(config: EvaluateConfig) -> list[RewardSpec | None]:
    """Return the judges' specs, None for the judge of film reviews. Raises ConfigError for settings that it lacks."""
    if config.judges is None:
        return []
    pairs = registry.parse("judges", config.judges)
    settings = next((kwargs for name, kwargs in pairs if name == IMDB and kwargs), None)
    if settings is not None:
        raise ConfigError(f"judges.{IMDB}", next(iter(settings)), "no settings", "Remove it: it has none.")
    others = [{name: kwargs} for name, kwargs in pairs if name != IMDB]
    opened = reward_specs(None, others, "judges") if others else []
    for spec in opened:
        for key, value, default in (("weight", spec.weight, 1.0), ("normalise", spec.normalise, None)):
            if value != default:
                fix = "Remove it, or give this one as --rewards, whose weighted sum is a measure."
                raise ConfigError(f"judges.{spec.source}.{key}", value, "none: each judge is a measure by itself", fix)
    specs = iter(opened)
    found = [None if name == IMDB else next(specs) for name, _ in pairs]
    names = [IMDB if spec is None else spec.name for spec in found]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ConfigError("judges", names, "a name of its own for each", f"Set `name:` of one {twice}, or remove it.")
    return found


def weighted_sum(values: Mapping[str, float | None], parts: Sequence[tuple[str, float]]) -> float | None:
    """Return Σ_k w_k·r_k over the rewards that apply to one answer, None where none does."""
    known = [weight * value for key, weight in parts if (value := values[key]) is not None]
    return sum(known) if known else None


@contextmanager
def naming(owners: Sequence[tuple[str, int, int]]) -> Iterator[None]:
    """Name the policy, the prompt and the answer in an error of one of the rollouts, whose owners are given."""
    try:
        yield
    except ApportionError as error:
        if error.row is not None:
            name, prompt, answer = owners[error.row]
            error.field = f"{error.field}, answer {answer + 1} of {name} to prompt {prompt + 1}"
            error.row = None
        raise
