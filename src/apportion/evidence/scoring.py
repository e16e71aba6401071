"""Scores and evidence in one pass a model: what turns sampled rollouts into scored ones."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from apportion import registry
from apportion.batching import micro_batches, trim, untrimmed
from apportion.config.sections import ScoreConfig
from apportion.errors import DataError, ScoreError
from apportion.evidence import Models, plan
from apportion.evidence.prefix import GIVES as PREFIX
from apportion.models.reward import RewardModel, adjust
from apportion.types import Rollouts

ALWAYS = frozenset({"scores", "old_logprobs", "entropy"})


def score(
    models: Models, rollouts: Rollouts, needs: Iterable[str], config: ScoreConfig, always: frozenset[str] = ALWAYS
) -> Rollouts:
    """Return the rollouts with scores and all evidence in `needs`, and with old log-probabilities if `always` says so.

    Each model sees every token once, in micro-batches of rows of like length. `scores` is the sequence's score
    after centring, scaling and clipping; evidence "raw_scores" (B,) is what the reward model said. Evidence in units
    of the score, such as "prefix_scores", is put through the same.

    Raises:
        ConfigError: a need that no producer gives. ScoreError: a score that is not one.
    """
    passes = plan(always | frozenset(needs))
    parts: dict[str, list[Tensor]] = {}
    everyone = torch.arange(len(rollouts), device=rollouts.mask.device)
    groups = micro_batches(rollouts, everyone, config.micro_batch, config.micro_tokens)
    for rows in groups:
        some = trim(rollouts.select(rows))
        for producer, wanted in passes:
            with renumbered(rows):
                produced = producer.produce(models, some, wanted)
            some = some.with_evidence(**{k: v for k, v in produced.items() if k not in ("scores", "old_logprobs")})
            for name, value in untrimmed(produced, some.mask.shape[1], rollouts.mask.shape[1]).items():
                parts.setdefault(name, []).append(value)
    back = torch.cat(groups).argsort()  # micro-batches are sorted by length
    found = {name: torch.cat(values)[back] for name, values in parts.items()}
    raw, old = found.pop("scores"), found.pop("old_logprobs", rollouts.old_logprobs)
    found |= in_score_units(found, models.reward, config)
    scored = replace(rollouts, scores=adjust(raw, models.reward, config), old_logprobs=old)
    return scored.with_evidence(**found, raw_scores=raw)


@contextmanager
def renumbered(rows: Tensor) -> Iterator[None]:
    """Name the rollout of an error in data or scores by its number in the batch, whose `rows` (b,) are the
    micro-batch."""
    try:
        yield
    except (DataError, ScoreError) as error:
        if error.row is not None:
            error.row = int(rows[error.row])
        raise


def in_score_units(found: Mapping[str, Tensor], reward: RewardModel, config: ScoreConfig) -> dict[str, Tensor]:
    """Return the evidence that is a score, or part of one, centred, scaled and clipped as the scores are.

    So a prefix's score is comparable with the response's: an affine map of a state potential is one as well. Parts of
    a score (Shapley values and their errors) are scaled alone; what clipping took stays with the score.
    """
    whole = config.model_copy(update={"clip": None})
    how = dict.fromkeys(PREFIX, config) | {"shapley_empty": whole}
    how |= dict.fromkeys(("shapley_values", "shapley_error"), whole.model_copy(update={"center": False}))
    asked = {name: how.get(registry.asked(name)[0]) for name in found}
    return {name: adjust(found[name], reward, chosen) for name, chosen in asked.items() if chosen is not None}
