"""The producers: what each model pass can tell about a batch, so that each model runs once and credits run none."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from apportion import registry
from apportion.config import SamplingConfig
from apportion.errors import ConfigError, DataError, message, unknown_name
from apportion.evidence.attribution_pass import attribution_pass
from apportion.evidence.implicit_pass import implicit_pass
from apportion.evidence.policy_pass import policy_pass
from apportion.evidence.process_pass import process_pass
from apportion.evidence.reference_pass import reference_pass
from apportion.evidence.reward_pass import reward_pass
from apportion.evidence.shapley_pass import shapley_pass
from apportion.models.policy import Policy
from apportion.models.reward import RewardModel
from apportion.types import Rollouts, Segmenter


@dataclass
class Models:
    """What evidence can come from.

    Attributes:
        policy, reward: the run's two models. segment: what counts as one action in this run.
        sampling, generator: how the policy writes, for producers that let it write again (vine).
        others: further models by the path in a setting, loaded when a producer first asks for one.
    """

    policy: Policy
    reward: RewardModel
    segment: Segmenter | None = None
    sampling: SamplingConfig | None = None
    generator: torch.Generator | None = None
    others: dict[str, Any] = field(default_factory=dict)


class Producer(NamedTuple):
    """One pass: the evidence it can give, the forwards and backwards it costs a micro-batch, and the pass itself.

    `produce(models, rollouts, wanted)` returns {name: tensor} for the wanted names, which carry their settings
    (`registry.asked`). The rollouts hold what earlier producers gave.
    """

    gives: frozenset[str]
    forwards: int
    backwards: int
    produce: Callable[[Models, Rollouts, frozenset[str]], Mapping[str, Tensor]]
    requires: Mapping[str, str] = {}  # settings that a need must carry, each with the mend where it is absent


PRODUCERS: Mapping[str, Producer] = {
    "policy": Producer(
        frozenset(
            {
                "old_logprobs",
                "values",
                "bootstrap_values",
                "entropy",
                "policy_attention_mean",
                "policy_attention_last",
            }
        ),
        1,
        0,
        lambda models, rollouts, wanted: policy_pass(models.policy, rollouts, wanted),
    ),
    "reference": Producer(
        frozenset({"reference_logprobs"}),
        1,
        0,
        lambda models, rollouts, wanted: reference_pass(models.policy, rollouts),
    ),
    "reward": Producer(
        frozenset({"scores", "reward_attention", "prefix_scores", "prompt_score"}),
        1,
        0,
        lambda models, rollouts, wanted: reward_pass(models.reward, rollouts, wanted),
    ),
    "attribution": Producer(
        frozenset({"reward_attribution"}),
        1,
        1,
        lambda models, rollouts, wanted: attribution_pass(models.reward, rollouts),
    ),
    "shapley": Producer(
        frozenset({"shapley_values", "shapley_empty", "shapley_error", "shapley_calls", "shapley_joined"}),
        64,  # texts a rollout, or what the setting `budget` says: at most; "shapley_calls" counts them
        0,
        shapley_pass,
    ),
    "implicit": Producer(
        frozenset({"implicit_logprobs"}),
        1,
        0,
        implicit_pass,
        {"model": "Set implicit.model to the model that DPO trained from the reference."},
    ),
    "process": Producer(
        frozenset({"process_rewards"}),
        0,
        0,
        process_pass,
        {"function": "Set process.function to your package.module:function."},
    ),
}


def plan(needs: Iterable[str]) -> list[tuple[Producer, frozenset[str]]]:
    """Return the passes to run, each once, with what is wanted of it.

    A need "package.module:function" is a producer of the user's: it is called with (models, rollouts, texts) and
    returns the tensor of that evidence, (B,), (B,T) or (B,T,k); it declares what it costs in attributes `forwards`
    and `backwards`.

    Raises:
        ConfigError: a name that no producer gives (it lists those that are given), or one without a setting that its
            producer requires.
    """
    needs = frozenset(needs)
    known = frozenset[str]().union(*(p.gives for p in PRODUCERS.values()))
    base = {name: registry.asked(name)[0] for name in needs}
    wanted = [(p, frozenset(n for n in needs if base[n] in p.gives)) for p in PRODUCERS.values()]
    passes = [(producer, names) for producer, names in wanted if names]
    for producer, names in passes:
        for name in sorted(names):
            _check_settings(producer, name)
    for name in sorted(n for n in needs if base[n] not in known):
        if ":" not in name:
            raise ConfigError(unknown_name("evidence", name, known))
        passes.append((_users(name), frozenset({name})))
    return passes


def _check_settings(producer: Producer, name: str) -> None:
    given = registry.asked(name)[1]
    for key, mend in producer.requires.items():
        if given.get(key) is None:
            raise ConfigError(message(f"evidence {name!r}", f"no {key}", f"the setting {key!r} of its method", mend))


def _users(name: str) -> Producer:
    function = registry.find("evidence", name, {})

    def produce(models: Models, rollouts: Rollouts, wanted: frozenset[str]) -> dict[str, Tensor]:
        decode = models.policy.tokenizer.decode
        texts = [decode(ids[mask]) for ids, mask in zip(rollouts.response_ids, rollouts.mask, strict=True)]
        made = function(models, rollouts, texts)
        if not isinstance(made, Tensor):
            mend = "Return one tensor whose first dimension is the batch."
            raise DataError(message(f"evidence[{name!r}]", type(made).__name__, "a tensor", mend))
        return {name: made}

    return Producer(frozenset({name}), getattr(function, "forwards", 0), getattr(function, "backwards", 0), produce)
