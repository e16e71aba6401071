"""Scores and evidence in one pass a model: what turns sampled rollouts into scored ones."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from apportion.config import ScoreConfig
from apportion.errors import ConfigError, ScoreError, message
from apportion.evidence import Models, plan
from apportion.models.reward import RewardModel
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


def adjust(scores: Tensor, reward: RewardModel, config: ScoreConfig) -> Tensor:
    """Return scores (B,) centred and scaled by the reward model's statistics, then clipped: a sequence at a time.

    Raises:
        ConfigError: centring or scaling is asked for, and the reward model's folder has no statistics.
    """
    if config.center or config.scale:
        if reward.mean is None or reward.sd is None:
            came = "a reward model without reward.json beside its weights"
            mend = 'Write {"mean": m, "sd": s} of its scores there, or set scores.center and scores.scale to false.'
            raise ConfigError(message("scores.center/scale", came, "its mean and sd", mend))
        scores = scores - reward.mean if config.center else scores
        scores = scores / max(reward.sd, 1e-6) if config.scale else scores
    return scores if config.clip is None else scores.clamp(-config.clip, config.clip)
