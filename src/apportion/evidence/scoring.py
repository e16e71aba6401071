"""Scoring of sampled rollouts: scores and all needed evidence, in one pass a model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import TypeAlias

import torch
from torch import Tensor

from apportion.batching import micro_batches, trim, untrimmed
from apportion.config.sections import ScoreConfig
from apportion.errors import ApportionError, ConfigError, DataError, ModelError, ScoreError, UserCodeError
from apportion.evidence import Models, Producer, plan
from apportion.evidence.prefix import PREFIX
from apportion.models.reward import RewardModel, adjust
from apportion.registry import EvidenceKey
from apportion.types import Rollouts

BASE_EVIDENCE = frozenset({"scores", "old_logprobs", "entropy"})
Failures: TypeAlias = Mapping[str, ApportionError]
LEFT_OUT = (ConfigError, DataError, ModelError, ScoreError, UserCodeError)  # where evidence is only logged


def score(
    models: Models,
    rollouts: Rollouts,
    needs: Iterable[str],
    config: ScoreConfig,
    always: frozenset[str] = BASE_EVIDENCE,
    logged: frozenset[str] = frozenset(),
    on_failure: Callable[[Failures], None] = lambda failures: None,
) -> Rollouts:
    """Return the rollouts with scores and all evidence in `needs` and `always`.

    Each model computes every token once, in micro-batches of rows of similar length; then the memory of frozen ones is
    given back. `scores` is the sequence's score
    after centring, scaling and clipping; evidence "raw_scores" (B,) is the reward model's own. Evidence in units of the
    score, such as "prefix_scores", is transformed equally. Where `models` have further rewards, both are their sums.

    Args:
        logged: needs that only the log has. One that fails in a row is absent from the result.
        on_failure: called with {need: error} of those that failed.

    Raises:
        ConfigError: a need that no producer provides. ScoreError: a score that is not finite.
    """
    try:
        return _score(models, rollouts, needs, config, always, logged, on_failure)
    finally:
        models.release_frozen()


def _score(
    models: Models,
    rollouts: Rollouts,
    needs: Iterable[str],
    config: ScoreConfig,
    always: frozenset[str],
    logged: frozenset[str],
    on_failure: Callable[[Failures], None],
) -> Rollouts:
    """Do as `score` says."""
    if models.reward is None:
        always -= {"scores"}
    passes = plan(always | frozenset(needs))
    parts: dict[str, list[Tensor]] = {}
    failures: dict[str, ApportionError] = {}
    everyone = torch.arange(len(rollouts), device=rollouts.mask.device)
    groups = micro_batches(rollouts, everyone, config.micro_batch, config.micro_tokens)
    for rows in groups:
        some = trim(rollouts.select(rows))
        for producer, wanted in passes:
            produced = _produced(producer, models, some, wanted - failures.keys(), rows, logged, failures)
            some = some.with_evidence(**{k: v for k, v in produced.items() if k not in ("scores", "old_logprobs")})
            for name, value in untrimmed(produced, some.mask.shape[1], rollouts.mask.shape[1]).items():
                parts.setdefault(name, []).append(value)
    back = torch.cat(groups).argsort()  # micro-batches are sorted by length
    if failures:
        on_failure(failures)
    evidence = {name: torch.cat(values)[back] for name, values in parts.items() if name not in failures}
    raw, old = evidence.pop("scores", None), evidence.pop("old_logprobs", rollouts.old_logprobs)
    if models.rewards is None:
        assert raw is not None
        evidence |= in_score_units(evidence, models.reward_model, config)
        scored = replace(rollouts, scores=adjust(raw, models.reward, config), old_logprobs=old)
        return scored.with_evidence(**evidence, raw_scores=raw)
    if models.reward is not None:
        unclipped, weight = config.model_copy(update={"clip": None}), models.rewards.model_weight  # the sum is clipped
        units = in_score_units(evidence, models.reward, unclipped)
        evidence |= {name: value * weight for name, value in units.items()}
    rollouts = replace(rollouts, old_logprobs=old).with_evidence(**evidence)
    return models.rewards.score(models, rollouts, raw)


def _produced(
    producer: Producer,
    models: Models,
    rollouts: Rollouts,
    wanted: frozenset[str],
    rows: Tensor,
    logged: frozenset[str],
    failures: dict[str, ApportionError],
) -> dict[str, Tensor]:
    """Return the evidence `wanted` of one pass; errors of what it cannot give of the `logged` go to `failures`."""
    if not wanted:
        return {}
    try:
        with renumbered(rows):
            return dict(producer.produce(models, rollouts, wanted))
    except LEFT_OUT as error:
        apart = wanted & logged
        if not apart:
            raise
        if len(wanted) == 1:
            failures |= dict.fromkeys(wanted, error)
            return {}
    produced: dict[str, Tensor] = {}
    for some in (wanted - apart, *(frozenset({need}) for need in sorted(apart))):  # which of them was it?
        produced |= _produced(producer, models, rollouts, some, rows, logged, failures)
    return produced


@contextmanager
def renumbered(rows: Tensor) -> Iterator[None]:
    """Make the row of a DataError or ScoreError that of the batch; `rows` (b,) are those of the micro-batch."""
    try:
        yield
    except (DataError, ScoreError) as error:
        if error.row is not None:
            error.row = int(rows[error.row])
        raise


def in_score_units(evidence: Mapping[str, Tensor], reward: RewardModel, config: ScoreConfig) -> dict[str, Tensor]:
    """Return the evidence that is a score, or part of one, centred, scaled and clipped as the scores are.

    So a prefix's score is comparable with the response's: an affine map of a state potential is one as well. Parts of
    a score (Shapley values and their errors) are only scaled, and not clipped.
    """
    unclipped = config.model_copy(update={"clip": None})
    configs = dict.fromkeys(PREFIX, config) | {"shapley_empty": unclipped}
    configs |= dict.fromkeys(("shapley_values", "shapley_error"), unclipped.model_copy(update={"center": False}))
    chosen = {name: configs.get(EvidenceKey.of(name).name) for name in evidence}
    return {name: adjust(evidence[name], reward, one) for name, one in chosen.items() if one is not None}
