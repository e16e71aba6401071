"""Producers of evidence: each is one pass over a batch, so that each model runs once and methods run none."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from torch import Tensor

from apportion import registry
from apportion.errors import ConfigError, unknown_name
from apportion.evidence.attribution import attribution_evidence
from apportion.evidence.implicit import implicit_evidence
from apportion.evidence.models import Models
from apportion.evidence.policy import POLICY, policy_evidence, reference_evidence
from apportion.evidence.process import process_evidence, with_columns
from apportion.evidence.reward import REWARD, reward_evidence
from apportion.evidence.shapley import SHAPLEY, shapley_evidence
from apportion.evidence.text.boundaries import BOUNDARIES, check_packages, text_boundaries
from apportion.evidence.vine import VINE, vine_evidence
from apportion.registry import EvidenceKey
from apportion.types import Rollouts
from apportion.user_code import validate_evidence

__all__ = ["PRODUCERS", "Models", "Producer", "plan"]


class Producer(NamedTuple):
    """One pass: the evidence it provides, its cost in forwards and backwards a micro-batch, and the function.

    `produce(models, rollouts, needs)` returns {need: tensor}; the needs carry their settings (`EvidenceKey`). The
    rollouts hold the evidence of earlier producers. `requires` are settings that a need must carry, each with the fix
    where it is absent. `check(needs)` is called before any model is loaded and raises ConfigError where a package that
    they need is not installed.
    """

    provides: frozenset[str]
    forwards: int
    backwards: int
    produce: Callable[[Models, Rollouts, frozenset[str]], Mapping[str, Tensor]]
    requires: Mapping[str, str] = {}
    check: Callable[[frozenset[str]], None] = lambda needs: None


def _policy_evidence(models: Models, rollouts: Rollouts, needs: frozenset[str]) -> Mapping[str, Tensor]:
    models.release_frozen()
    return policy_evidence(models.policy, rollouts, needs)


PRODUCERS: Mapping[str, Producer] = {
    "reference": Producer(
        frozenset({"reference_logprobs"}),
        1,
        0,
        lambda models, rollouts, needs: reference_evidence(models.policy, rollouts),
    ),
    "reward": Producer(
        REWARD, 1, 0, lambda models, rollouts, needs: reward_evidence(models.reward_model, rollouts, needs)
    ),
    "attribution": Producer(
        frozenset({"reward_attribution"}),
        1,
        1,
        lambda models, rollouts, needs: attribution_evidence(models.reward_model, rollouts),
    ),
    # after the frozen models: where its graph is kept, it takes their memory
    "policy": Producer(POLICY, 1, 0, _policy_evidence),
    # at most 64 texts a rollout, or the setting `budget`; "shapley_calls" counts them
    "shapley": Producer(SHAPLEY, 64, 0, shapley_evidence),
    "implicit": Producer(
        frozenset({"implicit_logprobs"}),
        1,
        0,
        implicit_evidence,
        {"model": "Set implicit.model to the model that DPO trained from the reference: --credit.implicit.model PATH."},
    ),
    "process": Producer(
        frozenset({"process_rewards"}),
        0,
        0,
        process_evidence,
        {"function": "Set process.function to your package.module:function."},
    ),
    "text": Producer(
        BOUNDARIES,
        0,
        0,
        lambda models, rollouts, needs: text_boundaries(models.policy.tokenizer, rollouts, needs),
        check=check_packages,
    ),
    # 9 responses an action, or the setting `samples`; "vine_calls" counts them. Last: it calls the run's segmenter,
    # which may need the evidence of the producers above
    "vine": Producer(VINE, 9, 0, vine_evidence),
}


def plan(needs: Iterable[str]) -> list[tuple[Producer, frozenset[str]]]:
    """Return the passes to run, each once, with the needs that it is to produce.

    A need "package.module:function" is a user-supplied producer: it is called with (models, rollouts, texts), and with
    the columns of the prompts' rows that its signature names, and returns that evidence, (B,), (B,T) or (B,T,k); its
    attributes `forwards` and `backwards` declare its
    cost.

    Raises:
        ConfigError: a name that no producer provides (with the known names), a need without a setting that its
            producer requires, or a package that one needs is not installed.
    """
    needs = frozenset(needs)
    known = frozenset[str]().union(*(p.provides for p in PRODUCERS.values()))
    by_producer = [(p, frozenset(n for n in needs if EvidenceKey.of(n).name in p.provides)) for p in PRODUCERS.values()]
    passes = [(producer, wanted) for producer, wanted in by_producer if wanted]
    for producer, wanted in passes:
        for need in sorted(wanted):
            _check_settings(producer, need)
        producer.check(wanted)
    for need in sorted(n for n in needs if EvidenceKey.of(n).name not in known):
        if ":" not in need:
            raise unknown_name("evidence", need, known)
        passes.append((_user_supplied(need), frozenset({need})))
    return passes


def _check_settings(producer: Producer, need: str) -> None:
    settings = EvidenceKey.of(need).settings
    for key, fix in producer.requires.items():
        if settings.get(key) is None:
            raise ConfigError(f"evidence {need!r}", f"no {key}", f"the setting {key!r} of its method", fix)


def _user_supplied(need: str) -> Producer:
    function = registry.find("evidence", need, {})

    def produce(models: Models, rollouts: Rollouts, needs: frozenset[str]) -> dict[str, Tensor]:
        decode = models.policy.tokenizer.decode
        texts = [decode(ids[mask]) for ids, mask in zip(rollouts.response_ids, rollouts.mask, strict=True)]
        called = with_columns(need, function, models, rollouts)
        result = models.user_code.call(need, called, models, rollouts, texts)
        return {need: validate_evidence(need, result, rollouts.mask)}

    return Producer(frozenset({need}), getattr(function, "forwards", 0), getattr(function, "backwards", 0), produce)
