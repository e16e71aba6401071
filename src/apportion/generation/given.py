"""Rollouts of given prompts and responses, which nobody sampled here: probes, demonstrations, answers in files."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from apportion.generation.decode import left_pad
from apportion.types import Rollouts


def given_rollouts(
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    pad: int,
    device: torch.device,
    *,
    masks: Sequence[Sequence[bool]] | None = None,
    group: Sequence[int] | None = None,
    ended: Sequence[bool] | None = None,
) -> Rollouts:
    """Return B rows of ids as rollouts (B,P) and (B,T) on `device`; since none was sampled, `logprobs` is 0.

    Args:
        pad: the id that fills prompts on the left and responses on the right.
        masks: True on the tokens of a response that count, each as long as its response; None counts all.
        group: the number of each row's prompt; None takes every row for a prompt of its own.
        ended: False where a response was cut off; None where all ended.
    """
    ids, seen = left_pad(prompts, pad)
    width = max(1, *map(len, responses))
    padded = torch.tensor([[*row, *[pad] * (width - len(row))] for row in responses], dtype=torch.int64)
    valid = torch.arange(width) < torch.tensor([[len(row)] for row in responses])
    mask = valid
    if masks is not None:
        mask = torch.tensor([[*map(bool, row), *[False] * (width - len(row))] for row in masks])
    numbers = torch.arange(len(prompts)) if group is None else torch.tensor(group, dtype=torch.int64)
    return Rollouts(
        prompt_ids=ids.to(device),
        prompt_mask=seen.to(device),
        response_ids=padded.to(device),
        mask=mask.to(device),
        valid=valid.to(device),
        logprobs=torch.zeros(mask.shape, device=device),
        group=numbers.to(device),
        ended=None if ended is None else torch.tensor(ended, device=device),
    )
