"""Metrics of one batch beside those of its update."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from apportion.config import ScoreConfig
from apportion.masking import first_index, last_index, masked_mean
from apportion.rewards.mixture import LOGGED
from apportion.types import Rollouts
from apportion.user_code import means

if TYPE_CHECKING:
    from apportion.stages.rl.learner import Learner
    from apportion.stages.rl.update import Targets


LEAST_ENDS = 12  # ended responses of a batch below which a correlation over them is noise


def batch_metrics(
    learner: Learner, rollouts: Rollouts, rewards: Tensor, targets: Targets, config: ScoreConfig
) -> dict[str, float]:
    """Return the batch's metrics: estimator statistics, scores, KL, lengths, advantages by position, the learning rate,
    clipped scores, compared credits that the log lacks."""
    method, metrics, segments = learner.method, dict[str, float](), targets.segments
    if hasattr(method.estimate, "stats"):
        metrics |= means(method.specs, "advantages", method.estimate.stats(rewards, segments, rollouts))
    metrics |= rollout_metrics(rollouts, rewards, segments)
    metrics |= position_metrics(targets.advantages, targets.policy_mask, rollouts)
    metrics |= reward_metrics(rollouts)
    metrics |= {"policy/lr": learner.optimizer.param_groups[0]["lr"]}
    if config.clip is not None and rollouts.scores is not None:
        clipped = rollouts.scores.abs() >= config.clip * (1 - 1e-6)
        metrics["objective/scores_clipped"] = float(clipped.float().mean())
    if learner.compare.left_out:
        metrics["compare/left_out"] = float(learner.compare.left_out)
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


def reward_metrics(rollouts: Rollouts) -> dict[str, float]:
    """Return the metrics of each reward of a run with several, or with functions or rules, as it was given.

    rewards/NAME/mean and rewards/NAME/std over the rollouts that it applies to (left out where there are none), and
    rewards/NAME/none, the share of the others, where there are some.
    """
    metrics: dict[str, float] = {}
    for key, values in rollouts.evidence.items():
        if key.startswith(LOGGED):
            name, known = f"rewards/{key.removeprefix(LOGGED)}", values[~values.isnan()]
            if len(known):
                metrics |= {f"{name}/mean": float(known.mean()), f"{name}/std": float(known.std(unbiased=False))}
            if len(known) < len(values):
                metrics[f"{name}/none"] = 1.0 - len(known) / len(values)
    return metrics


def position_metrics(advantages: Tensor, mask: Tensor, rollouts: Rollouts) -> dict[str, float]:
    """Return the mean of the advantages (B,T) of the update by position, over the tokens `mask` (B,T) that it counts.

    A credit that is not causal pays by tokens that come later, and its bias shows here: at the end token, whose
    advantage then depends on the length, and in a slope from the first tokens to the last. A metric without tokens is
    left out:

        advantage/first_token               each response's first token
        advantage/quarter_1 … quarter_4     token i (from 0) of n is in quarter 1 + ⌊4i/n⌋
        advantage/end_token                 the last token of responses that ended by themselves
        advantage/end_token_length_corr     Pearson's r of that with the response's length, over at least 12 of them
    """
    rows = mask.any(dim=1)
    sampled_ended = rollouts.evidence.get("sampled_ended", rollouts.ended)
    ended = rows if sampled_ended is None else rows & sampled_ended.bool()
    length = mask.sum(dim=1)
    quarter = 4 * (mask.cumsum(dim=1) - 1) // length.clamp_min(1)[:, None]
    first, end = (advantages.gather(1, at.clamp_min(0)[:, None])[:, 0] for at in (first_index(mask), last_index(mask)))
    places = {"first_token": (first, rows), "end_token": (end, ended)}
    places |= {f"quarter_{i + 1}": (advantages, mask & (quarter == i)) for i in range(4)}
    sums = torch.stack([torch.where(on, values.float(), 0.0).sum() for values, on in places.values()]).tolist()
    counts = torch.stack([on.sum() for _, on in places.values()]).tolist()
    metrics = {f"advantage/{name}": sums[i] / counts[i] for i, name in enumerate(places) if counts[i]}
    r = correlation(end[ended], length[ended]) if metrics and counts[1] >= LEAST_ENDS else None
    return metrics | ({} if r is None else {"advantage/end_token_length_corr": r})


def correlation(one: Tensor, two: Tensor) -> float | None:
    """Return Pearson's r of two (N,) tensors; None where one of them is constant up to rounding."""
    deviations = []
    for values in (one.double(), two.double()):
        if values.max() - values.min() <= 1e-6 * values.abs().max():
            return None
        apart = values - values.mean()
        deviations.append(apart / apart.norm())
    return float(deviations[0] @ deviations[1])
