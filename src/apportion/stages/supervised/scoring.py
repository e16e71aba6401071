"""Log-probabilities of held-out answers under a saved model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from apportion.config import TrainerConfig
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
    width = max(firsts)
    length = max(len(row.ids) - first for row, first in zip(rows, firsts, strict=True))
    count = len(rows)
    prompts, responses = torch.full((count, width), pad), torch.full((count, length), pad)
    before, valid, mask = (torch.zeros(count, size, dtype=torch.bool) for size in (width, length, length))
    for i, (row, first) in enumerate(zip(rows, firsts, strict=True)):
        rest = len(row.ids) - first
        prompts[i, width - first :], before[i, width - first :] = torch.tensor(row.ids[:first]), True
        responses[i, :rest], valid[i, :rest] = torch.tensor(row.ids[first:]), True
        mask[i, :rest] = torch.tensor(row.mask[first:])
    return Rollouts(
        prompt_ids=prompts.to(device),
        prompt_mask=before.to(device),
        response_ids=responses.to(device),
        mask=mask.to(device),
        valid=valid.to(device),
        logprobs=torch.zeros(count, length, device=device),
        group=torch.arange(count, device=device),
    )
