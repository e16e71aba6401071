"""Cutting a batch into micro-batches of like length, without the columns that only padding fills."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields

import torch
from torch import Tensor

from apportion.types import Rollouts


def micro_batches(rollouts: Rollouts, index: Tensor, rows: int, tokens: int) -> list[Tensor]:
    """Return the rollouts numbered `index` (n,) in groups to compute at once, the longest first.

    Responses to one prompt stand together, so that it is read once (`models.prefix`); otherwise rows of like length
    do, so that little is padded. A group has at most `rows` rows and at most `tokens` positions: its distinct prompts
    and its responses, padded to the longest (one row always).
    """
    prompts = rollouts.prompt_mask[index].sum(dim=1)
    # up to the last token that is attended to: a response may have holes
    steps = torch.arange(1, rollouts.valid.shape[1] + 1, device=index.device)
    responses = (rollouts.valid[index] * steps).amax(dim=1) if len(steps) else torch.zeros_like(prompts)
    _, group = torch.unique(rollouts.group[index], return_inverse=True)
    total = prompts + responses
    longest = torch.zeros_like(total).scatter_reduce_(0, group, total, "amax")[group]
    order = total.argsort(descending=True, stable=True)
    order = order[(longest[order] * len(index) - group[order]).argsort(descending=True, stable=True)]
    batches: list[_Batch] = []
    for i, mine, *lengths in torch.stack([order, group[order], prompts[order], responses[order]], dim=1).tolist():
        if not batches or not batches[-1].takes(mine, lengths, rows, tokens):
            batches.append(_Batch())
        batches[-1].add(i, mine, lengths)
    return [index[torch.tensor(sorted(batch.rows), device=index.device)] for batch in batches]


class _Batch:
    """Rows to compute at once: their numbers, their prompts' numbers, and the longest prompt and response."""

    def __init__(self) -> None:
        self.rows: list[int] = []
        self.prompts: set[int] = set()
        self.longest = [0, 0]

    def takes(self, prompt: int, lengths: list[int], rows: int, tokens: int) -> bool:
        """Return whether a row more stays within `rows` and `tokens`."""
        wide = [max(pair) for pair in zip(self.longest, lengths, strict=True)]
        size = len(self.prompts | {prompt}) * wide[0] + (len(self.rows) + 1) * wide[1]
        return len(self.rows) < rows and size <= tokens

    def add(self, row: int, prompt: int, lengths: list[int]) -> None:
        """Take a row."""
        self.rows.append(row)
        self.prompts.add(prompt)
        self.longest = [max(pair) for pair in zip(self.longest, lengths, strict=True)]


def trim(rollouts: Rollouts) -> Rollouts:
    """Return the rollouts without columns that are padding in every row: on the prompts' left, on the responses' right.

    At least one column of each stays. Evidence (B,T) and (B,T,k) is cut as the responses are.
    """
    first = int((~rollouts.prompt_mask.any(dim=0)).int().cumprod(dim=0).sum()) if len(rollouts) else 0
    first = min(first, max(rollouts.prompt_ids.shape[1] - 1, 0))
    kept = response_columns(rollouts)
    if first == 0 and kept == rollouts.mask.shape[1]:
        return rollouts
    cut = {}
    for f in fields(rollouts):
        value = getattr(rollouts, f.name)
        if f.name.startswith("prompt_"):
            value = value[:, first:]
        elif isinstance(value, Tensor) and value.dim() >= 2:
            value = value[:, :kept]
        elif f.name == "evidence":
            value = {k: v[:, :kept] if v.dim() >= 2 else v for k, v in value.items()}
        cut[f.name] = value
    return Rollouts(**cut)


def response_columns(rollouts: Rollouts) -> int:
    """Return the number of response columns up to the last one in use in any row (at least 1 where there are some)."""
    used = (rollouts.valid | rollouts.mask).any(dim=0).nonzero()
    return int(used[-1]) + 1 if len(used) else min(1, rollouts.mask.shape[1])


def untrimmed(produced: Mapping[str, Tensor], kept: int, length: int) -> dict[str, Tensor]:
    """Return tensors (b,kept…) that were produced of trimmed rollouts with zeros up to `length` columns."""
    if kept == length:
        return dict(produced)
    return {
        name: torch.cat([t, t.new_zeros(len(t), length - kept, *t.shape[2:])], dim=1) if t.dim() >= 2 else t
        for name, t in produced.items()
    }
