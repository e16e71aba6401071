"""Log-probabilities of held-out answers under a saved model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from apportion.config import TrainerConfig
from apportion.generation.given import given_rollouts
from apportion.models.loading import load_causal, pick_device, pick_dtype
from apportion.models.policy import Policy
from apportion.models.text.targets import Target
from apportion.models.tokenizers import needed_rows
from apportion.stages.supervised.rows import Start
from apportion.system.progress import counted
from apportion.types import Rollouts

ROWS, TOKENS = 32, 4096  # most rows and positions of a forward


def answer_logprobs(folder: str, rows: Sequence[Target], config: TrainerConfig, start: Start) -> Tensor:
    """Return log π of each row's target under the model in `folder`, summed over its tokens, (N,) float64 in nats.

    The first token of a row that is all target has no probability, and does not count.
    """
    device = pick_device(config.device)
    dtype = pick_dtype(config.dtype, device)
    least = needed_rows(start.tokenizer, config.pad_token)
    model: Any = load_causal("model", folder, dtype, device, fast_kernels=config.fast_kernels, rows=least)
    policy = Policy(model, start.tokenizer, [], ends=start.ends)
    sums = torch.zeros(len(rows), dtype=torch.float64)
    batches = batches_of([len(row.ids) for row in rows])
    for batch in counted(batches, "scoring held-out rows", len(batches), unit="batch"):
        rollouts = as_rollouts([rows[i] for i in batch], policy.pad, device)
        with torch.no_grad():
            logprobs, _, _ = policy.score_tokens(policy.model, rollouts, entropy=False)
        sums[batch] = logprobs.double().sum(dim=1).cpu()
    return sums


def counted_tokens(row: Target) -> int:
    """Return how many tokens of a row have a probability that counts."""
    return sum(row.mask[1:])


def batches_of(lengths: Sequence[int]) -> list[list[int]]:
    """Return the rows in batches of like length, within `ROWS` and `TOKENS`."""
    batches: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batches and len(batches[-1]) < ROWS and lengths[batches[-1][0]] * (len(batches[-1]) + 1) <= TOKENS:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches


def as_rollouts(rows: Sequence[Target], pad: int, device: torch.device) -> Rollouts:
    """Return rows as rollouts: what stands before the target as prompt, the rest as response."""
    firsts = [max(1, row.first) for row in rows]
    cut = list(zip(rows, firsts, strict=True))
    prompts, responses = [row.ids[:first] for row, first in cut], [row.ids[first:] for row, first in cut]
    return given_rollouts(prompts, responses, pad, device, masks=[row.mask[first:] for row, first in cut])
