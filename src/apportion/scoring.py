"""Scores and evidence in one pass a model: what turns sampled rollouts into scored ones."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from apportion import registry
from apportion.config import ScoreConfig
from apportion.errors import ConfigError, ScoreError, message
from apportion.evidence import Models, plan
from apportion.evidence.prefix_pass import GIVES as PREFIX
from apportion.models.reward import RewardModel, is_decoder
from apportion.types import Rollouts

ALWAYS = frozenset({"scores", "old_logprobs", "entropy"})


def score(models: Models, rollouts: Rollouts, needs: Iterable[str], config: ScoreConfig) -> Rollouts:
    """Return the rollouts with scores, old log-probabilities and all evidence in `needs`.

    Each model sees every token once, in micro-batches of `config.micro_batch` rows. `scores` is the sequence's score
    after centring, scaling and clipping; evidence "raw_scores" (B,) is what the reward model said. Evidence in units
    of the score, such as "prefix_scores", is put through the same.

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
    found |= in_score_units(found, models.reward, config)
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
    """Return scores (B,) centred and scaled by the reward model's statistics, then clipped: a sequence at a time
    (or (B,T), a prefix at a time).

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


def in_score_units(found: Mapping[str, Tensor], reward: RewardModel, config: ScoreConfig) -> dict[str, Tensor]:
    """Return the evidence that is a score, or part of one, centred, scaled and clipped as the scores are.

    So a prefix's score is comparable with the response's: an affine map of a state potential is one as well. Parts of
    a score (Shapley values and their errors) are scaled alone; what clipping took stays with the score.
    """
    whole = replace(config, clip=None)
    how = dict.fromkeys(PREFIX, config) | {"shapley_empty": whole}
    how |= dict.fromkeys(("shapley_values", "shapley_error"), replace(whole, center=False))
    asked = {name: how.get(registry.asked(name)[0]) for name in found}
    return {name: adjust(found[name], reward, chosen) for name, chosen in asked.items() if chosen is not None}


def check_vocabulary(policy_tokenizer: Any, reward_tokenizer: Any) -> None:
    """Raise ConfigError when the reward model cannot read the policy's ids. Needs no weights."""
    ours, theirs = policy_tokenizer.get_vocab(), reward_tokenizer.get_vocab()
    if ours != theirs:
        came = f"a reward model with another vocabulary ({len(theirs)} entries, the policy has {len(ours)})"
        mend = "Train the reward model from the same base: `apportion reward --model <the policy's start>`."
        raise ConfigError(message("reward_model", came, "the policy's own tokenizer", mend))


def check_decoder(reward: RewardModel) -> None:
    """Raise ConfigError for an encoder, which does not read its score at the response's last token."""
    if not is_decoder(reward.model):
        mend = "Use a decoder; `apportion credit` reads encoders too."
        raise ConfigError(message("reward_model", type(reward.model).__name__, "a causal sequence classifier", mend))
