"""Scores and evidence in one pass a model: what turns sampled rollouts into scored ones."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from apportion.config import ScoreConfig
from apportion.errors import ScoreError
from apportion.evidence import Models, plan
from apportion.models.reward import adjust
from apportion.types import Rollouts

ALWAYS = frozenset({"scores", "old_logprobs", "entropy"})


def score(models: Models, rollouts: Rollouts, needs: Iterable[str], config: ScoreConfig) -> Rollouts:
    """Return the rollouts with scores, old log-probabilities and all evidence in `needs`.

    Each model sees every token once, in micro-batches of `config.micro_batch` rows. `scores` is the sequence's score
    after centring, scaling and clipping; evidence "raw_scores" (B,) is what the reward model said.

    Raises:
        ConfigError: a need that no producer gives. ScoreError: a score that is not one.
    """
    passes = plan(ALWAYS | frozenset(needs))
    parts: dict[str, list[Tensor]] = {}
    for rows in torch.arange(len(rollouts), device=rollouts.mask.device).split(config.micro_batch):
        some = rollouts.select(rows)
        for producer, wanted in passes:
            with renumbered(int(rows[0])):
                produced = producer.produce(models, some, wanted)
            some = some.with_evidence(**{k: v for k, v in produced.items() if k not in ("scores", "old_logprobs")})
            for name, value in produced.items():
                parts.setdefault(name, []).append(value)
    found = {name: torch.cat(values) for name, values in parts.items()}
    raw, old = found.pop("scores"), found.pop("old_logprobs")
    scored = replace(rollouts, scores=adjust(raw, models.reward, config), old_logprobs=old)
    return scored.with_evidence(**found, raw_scores=raw)


@contextmanager
def renumbered(first: int) -> Iterator[None]:
    """Name the rollout of a ScoreError by its number in the batch, where its micro-batch starts at `first`."""
    try:
        yield
    except ScoreError as error:
        text = re.sub(r"rollout (\d+)", lambda found: f"rollout {int(found[1]) + first}", str(error), count=1)
        raise ScoreError(text) from error
