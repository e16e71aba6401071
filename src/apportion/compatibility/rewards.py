"""Rules on the rewards of a run: what needs a reward model, and what a normalised reward does not go with."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from apportion import credit
from apportion.compatibility._refusal import Refusal
from apportion.config import RewardSpec, RLConfig, reward_models, reward_specs
from apportion.config.rl import COMPARE
from apportion.registry import EvidenceKey
from apportion.types import Method

# evidence that a reward model makes, and no function or rule; the second half is in units of its score
FROM_REWARD_MODEL = ("reward_attention", "reward_attribution", "prefix_scores", "prompt_score", "shapley_")
IN_SCORE_UNITS = FROM_REWARD_MODEL[2:]


def specs_of(config: RLConfig) -> list[RewardSpec]:
    """Return the rewards that a run's settings name. Raises ConfigError as `reward_specs`."""
    return reward_specs(config.reward_model, config.rewards)


def check_rewards(config: RLConfig, method: Method) -> None:
    """Leave credits that need a reward model out of the default `compare` of a run without one, and check the rest.

    Raises:
        ConfigError: rewards that are no list of rewards, or that the method or a setting does not go with.
    """
    subject = Subject(config, method)
    if config.compare == list(COMPARE) and not subject.has_reward_model:
        config.compare = [name for name in COMPARE if not made_by_reward_model(credit.make(name, {}).needs)]
    for refusal in REWARDS:
        refusal.check(subject)


def made_by_reward_model(needs: Iterable[str], kinds: tuple[str, ...] = FROM_REWARD_MODEL) -> list[str]:
    """Return those of the evidence `needs` that only a reward model makes; `kinds` are beginnings of names."""
    return sorted(need for need in needs if EvidenceKey.of(need).name.startswith(kinds))


@dataclass(frozen=True)
class Subject:
    """A run's settings and its method, as the rules below see them."""

    config: RLConfig
    method: Method

    @cached_property
    def rewards(self) -> list[RewardSpec]:
        """The rewards of the run."""
        return specs_of(self.config)

    @property
    def has_reward_model(self) -> bool:
        """Whether one of the rewards is a reward model."""
        return bool(reward_models(self.rewards))

    @property
    def needing_reward_model(self) -> list[str]:
        """The parts of the method that need evidence of a reward model, in words."""
        chain = [pair for spec in self.method.specs["credit"] for pair in spec.items()]
        parts = [(name, credit.make(name, dict(kwargs)).needs) for name, kwargs in chain if name in credit.METHODS]
        named = [name for name, needs in parts if made_by_reward_model(needs)]
        return named or made_by_reward_model(self.method.needs)

    @property
    def compared_with_reward_model(self) -> list[str]:
        """The compared credits that need evidence of a reward model."""
        return [name for name in self.config.compare if made_by_reward_model(credit.make(name, {}).needs)]

    @property
    def standardised(self) -> list[str]:
        """The rewards that are normalised, the first reward model before the others."""
        return [spec.name for spec in sorted(self.rewards, key=lambda one: one.kind != "model") if spec.normalise]

    @property
    def pays_fresh_rollouts(self) -> bool:
        """Whether the method compares rewards with those of fresh rollouts."""
        return any(EvidenceKey.of(need).name == "vine_values" for need in self.method.needs)

    @property
    def moves_units(self) -> bool:
        """Whether the reward model's evidence is in units of its score, and that is normalised."""
        first = next(iter(reward_models(self.rewards)), None)
        return bool(first and first.normalise) and bool(made_by_reward_model(self.method.needs, IN_SCORE_UNITS))


REWARDS: tuple[Refusal[Subject], ...] = (
    Refusal(
        lambda r: not r.has_reward_model and bool(r.needing_reward_model),
        "credit",
        lambda r: f"{r.needing_reward_model[0]}, and rewards without a reward model",
        "a method that needs no evidence of a reward model: sparse, uniform, policy_attention, process",
        "Choose one (--credit sparse, or --algorithm grpo or ppo), or add a reward model to rewards.",
    ),
    Refusal(
        lambda r: not r.has_reward_model and bool(r.compared_with_reward_model),
        "compare",
        lambda r: r.compared_with_reward_model,
        "credits that need no evidence of a reward model, since rewards have none",
        "Leave it out of compare, or add a reward model to rewards.",
    ),
    Refusal(
        lambda r: not r.has_reward_model and r.config.ppo.value_model == "reward",
        "ppo.value_model",
        lambda r: "reward",
        "shared or separate: rewards have no reward model to start from",
        "Choose one of them, or add a reward model to rewards.",
    ),
    Refusal(
        lambda r: not r.has_reward_model and (r.config.scores.center or r.config.scores.scale),
        "scores.center/scale",
        lambda r: True,
        "false: they use statistics of a reward model, and rewards have none",
        "Set `normalise: batch` or `normalise: group` of a reward instead.",
    ),
    Refusal(
        lambda r: r.pays_fresh_rollouts and bool(r.standardised),
        lambda r: f"rewards ({r.standardised[0]})",
        lambda r: "normalise with vine",
        "no normalise: vine's values are mean rewards of fresh rollouts, in the rewards' own units",
        "Remove it, or choose gae.",
    ),
    Refusal(
        lambda r: r.moves_units,
        lambda r: f"rewards ({r.standardised[0]})",
        lambda r: f"normalise with {r.needing_reward_model[0]}",
        "no normalise: this credit pays scores of parts of the text, in the reward model's own units",
        "Use scores.center and scores.scale, which both go through.",
    ),
)
