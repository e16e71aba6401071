"""Metrics of one batch beside those of its update."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from apportion.config import ScoreConfig
from apportion.masking import masked_mean
from apportion.types import Rollouts
from apportion.user_code import means

if TYPE_CHECKING:
    from apportion.stages.rl.learner import Learner


def batch_metrics(
    learner: Learner, rollouts: Rollouts, rewards: Tensor, segments: Tensor, config: ScoreConfig
) -> dict[str, float]:
    """Return the batch's metrics: estimator statistics, scores, KL, lengths, the learning rate, clipped scores."""
    method, metrics = learner.method, dict[str, float]()
    if hasattr(method.estimate, "stats"):
        metrics |= means(method.specs, "advantages", method.estimate.stats(rewards, segments, rollouts))
    metrics |= rollout_metrics(rollouts, rewards, segments)
    metrics |= {"policy/lr": learner.optimizer.param_groups[0]["lr"]}
    if config.clip is not None and rollouts.scores is not None:
        clipped = rollouts.scores.abs() >= config.clip * (1 - 1e-6)
        metrics["objective/scores_clipped"] = float(clipped.float().mean())
    return metrics


def rollout_metrics(rollouts: Rollouts, rewards: Tensor, segments: Tensor) -> dict[str, float]:
    """Return raw scores, rewards, KL (nats a sequence), entropy, length, actions, fallbacks, the share that ended."""
    raw, lengths = rollouts.evidence["raw_scores"], rollouts.mask.sum(dim=1).float()
    metrics = {
        "objective/scores": raw.mean(),
        "objective/scores_std": raw.std(unbiased=False),
        "objective/rewards": rewards.sum(dim=1).mean(),
        "objective/entropy": masked_mean(rollouts.evidence["entropy"], rollouts.mask),
        "objective/length": lengths.mean(),
        "segments/actions": (segments.amax(dim=1) + 1).float().mean(),
        "sampling/logprob_gap": masked_mean((rollouts.logprobs - rollouts.old_logprobs).abs(), rollouts.mask),
    }
    if "phrase_fallback" in rollouts.evidence:
        metrics["segments/fallback_rate"] = rollouts.evidence["phrase_fallback"].mean()
    if "reference_logprobs" in rollouts.evidence:
        log_ratios = rollouts.logprobs - rollouts.evidence["reference_logprobs"]
        metrics["objective/kl"] = torch.where(rollouts.mask, log_ratios, 0.0).sum(dim=1).mean()
    if "sampled_ended" in rollouts.evidence:
        metrics["objective/ended"] = rollouts.evidence["sampled_ended"].float().mean()
    return {name: float(value) for name, value in metrics.items()}
