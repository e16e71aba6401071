"""The producers: what each model pass can tell about a batch, so that each model runs once and credits run none."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from apportion import registry
from apportion.config.sections import SamplingConfig, ScoreConfig
from apportion.errors import ConfigError, unknown_name
from apportion.evidence.producers import PRODUCERS, Producer
from apportion.models.policy import Policy
from apportion.models.reward import RewardModel
from apportion.types import Rollouts, Segmenter
from apportion.user_code import UserCode, validate_evidence

__all__ = ["PRODUCERS", "Models", "Producer", "plan"]


@dataclass
class Models:
    """What evidence can come from.

    Attributes:
        policy, reward: the run's two models. segment: what counts as one action in this run.
        sampling, generator: how the policy writes, for producers that let it write again (vine).
        scores: what is done to a score before it is apportioned, for producers that score further texts.
        others: further models by the path in a setting, loaded when a producer first asks for one.
        user_code: calls user-supplied functions within their time limit.
    """

    policy: Policy
    reward: RewardModel
    segment: Segmenter | None = None
    sampling: SamplingConfig | None = None
    generator: torch.Generator | None = None
    scores: ScoreConfig = field(default_factory=ScoreConfig)
    others: dict[str, Any] = field(default_factory=dict)
    user_code: UserCode = field(default_factory=UserCode)


def plan(needs: Iterable[str]) -> list[tuple[Producer, frozenset[str]]]:
    """Return the passes to run, each once, with what is wanted of it.

    A need "package.module:function" is a producer of the user's: it is called with (models, rollouts, texts) and
    returns the tensor of that evidence, (B,), (B,T) or (B,T,k); it declares what it costs in attributes `forwards`
    and `backwards`.

    Raises:
        ConfigError: a name that no producer gives (it lists those that are given), one without a setting that its
            producer requires, or a package that one needs is absent.
    """
    needs = frozenset(needs)
    known = frozenset[str]().union(*(p.gives for p in PRODUCERS.values()))
    base = {name: registry.asked(name)[0] for name in needs}
    wanted = [(p, frozenset(n for n in needs if base[n] in p.gives)) for p in PRODUCERS.values()]
    passes = [(producer, names) for producer, names in wanted if names]
    for producer, names in passes:
        for name in sorted(names):
            _check_settings(producer, name)
        producer.ready(names)
    for name in sorted(n for n in needs if base[n] not in known):
        if ":" not in name:
            raise unknown_name("evidence", name, known)
        passes.append((_user_defined(name), frozenset({name})))
    return passes


def _check_settings(producer: Producer, name: str) -> None:
    given = registry.asked(name)[1]
    for key, fix in producer.requires.items():
        if given.get(key) is None:
            raise ConfigError(f"evidence {name!r}", f"no {key}", f"the setting {key!r} of its method", fix)


def _user_defined(name: str) -> Producer:
    function = registry.find("evidence", name, {})

    def produce(models: Models, rollouts: Rollouts, wanted: frozenset[str]) -> dict[str, Tensor]:
        decode = models.policy.tokenizer.decode
        texts = [decode(ids[mask]) for ids, mask in zip(rollouts.response_ids, rollouts.mask, strict=True)]
        values = models.user_code.call(name, function, models, rollouts, texts)
        return {name: validate_evidence(name, values, rollouts.mask)}

    return Producer(frozenset({name}), getattr(function, "forwards", 0), getattr(function, "backwards", 0), produce)
