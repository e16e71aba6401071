"""Evaluation of a reward model on held-out texts: accuracy, calibration, and the mean and deviation of its score."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from apportion.config import RewardConfig
from apportion.data import Labelled
from apportion.intervals import calibration, mean_interval, proportion
from apportion.models.reward import RewardModel, load_reward
from apportion.models.text.labelled import token_rows
from apportion.stages.reward.excerpts import Excerpt, random_excerpts, right_pad

LENGTHS = (10, 20, 40, 80)  # tokens of the held-out excerpts that accuracy is also reported for
BY_LENGTH = 500  # texts for each of them


def evaluate(folder: Path, rows: Sequence[Any], config: RewardConfig) -> dict[str, Any]:
    """Return accuracy with its interval, by excerpt length too, calibration, and mean and sd of R, on held-out texts."""
    loading: dict[str, Any] = {"dtype": config.dtype, "device": config.device, "fast_kernels": config.fast_kernels}
    reward = load_reward(str(folder), **loading, field="model")
    ids, labels, prompts = token_ids(rows, reward.tokenizer, config)
    excerpts = random_excerpts(ids, labels, prompts, len(rows), config.excerpt_tokens, config.seed + 1)
    scores, truth = scored(reward, excerpts), [c.label for c in excerpts]
    probabilities = torch.sigmoid(scores).tolist()
    bins, error = calibration(probabilities, truth)
    by_length = {}
    for length in LENGTHS:
        if length > config.excerpt_tokens[1]:
            continue
        first = zip(ids[:BY_LENGTH], labels[:BY_LENGTH], prompts[:BY_LENGTH], strict=True)
        cut = [Excerpt(row[: prompt + length], label) for row, label, prompt in first]
        by_length[str(length)] = accuracy(scored(reward, cut), [c.label for c in cut])
    return {
        "accuracy": accuracy(scores, truth),
        "by_length": by_length,
        "calibration": bins,
        "ece": error,
        "score_mean": float(scores.mean()),
        "score_sd": float(scores.std(unbiased=False)),
        "score_interval": mean_interval(scores.tolist()),
        "texts": len(rows),
        "excerpt_tokens": list(config.excerpt_tokens),
    }


def scored(reward: RewardModel, excerpts: Sequence[Excerpt], batch_size: int = 32) -> Tensor:
    """Return R (N,) float32 of the excerpts, on the CPU, computed in batches of like length."""
    out = torch.zeros(len(excerpts))
    order = sorted(range(len(excerpts)), key=lambda i: len(excerpts[i].ids))
    device = next(reward.model.parameters()).device
    for first in range(0, len(order), batch_size):
        chosen = order[first : first + batch_size]
        ids, mask, _ = right_pad([excerpts[i] for i in chosen], reward.model.config.get_text_config().pad_token_id)
        out[chosen] = reward.score(ids.to(device), mask.to(device))[0].cpu()
    return out


def accuracy(scores: Tensor, labels: Sequence[int]) -> dict[str, float]:
    """Return {mean, low, high} of how often R > 0 says the label."""
    hits = int(((scores > 0).long() == torch.tensor(labels)).sum())
    return proportion(hits, len(labels))


def token_ids(
    rows: Sequence[Labelled], tokenizer: Any, config: RewardConfig
) -> tuple[list[list[int]], list[int], list[int]]:
    """Return (ids of each row's text as far as an excerpt needs them, labels, number of ids of its prompt)."""
    ids, prompts = token_rows(rows, tokenizer, config.excerpt_tokens[1])
    return ids, [row.label for row in rows], prompts
