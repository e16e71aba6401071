"""Micro-batches of similar length, without columns of only padding."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace

import torch
from torch import Tensor

from apportion.types import Rollouts


def micro_batches(rollouts: Rollouts, index: Tensor, rows: int, tokens: int) -> list[Tensor]:
    """Return the rollouts numbered `index` (n,) in micro-batches, the longest first.

    Responses to one prompt are grouped, so that it is computed once (`models.shared_prompt`); otherwise rows of similar
    length, so that little is padded. A micro-batch has at most `rows` rows and at most `tokens` positions: its distinct
    prompts and its responses, padded to the longest (one row always).
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
    for i, prompt, *lengths in torch.stack([order, group[order], prompts[order], responses[order]], dim=1).tolist():
        if not batches or not batches[-1].fits(prompt, lengths, rows, tokens):
            batches.append(_Batch())
        batches[-1].add(i, prompt, lengths)
    return [index[torch.tensor(sorted(batch.rows), device=index.device)] for batch in batches]


class _Batch:
    """One micro-batch: its rows, its prompts, and the lengths of the longest prompt and response."""

    def __init__(self) -> None:
        self.rows: list[int] = []
        self.prompts: set[int] = set()
        self.longest = [0, 0]

    def fits(self, prompt: int, lengths: list[int], rows: int, tokens: int) -> bool:
        """Return whether another row stays within `rows` and `tokens`."""
        longest = [max(pair) for pair in zip(self.longest, lengths, strict=True)]
        size = len(self.prompts | {prompt}) * longest[0] + (len(self.rows) + 1) * longest[1]
        return len(self.rows) < rows and size <= tokens

    def add(self, row: int, prompt: int, lengths: list[int]) -> None:
        """Add a row."""
        self.rows.append(row)
        self.prompts.add(prompt)
        self.longest = [max(pair) for pair in zip(self.longest, lengths, strict=True)]


def trim(rollouts: Rollouts) -> Rollouts:
    """Return the rollouts without columns that are padding in every row: on the prompts' left, on the responses' right.

    At least one column of each remains. Evidence (B,T) and (B,T,k) is trimmed as the responses are.
    """
    first = int((~rollouts.prompt_mask.any(dim=0)).int().cumprod(dim=0).sum()) if len(rollouts) else 0
    first = min(first, max(rollouts.prompt_ids.shape[1] - 1, 0))
    columns = response_columns(rollouts)
    if first == 0 and columns == rollouts.mask.shape[1]:
        return rollouts
    trimmed = {}
    for f in fields(rollouts):
        value = getattr(rollouts, f.name)
        if f.name.startswith("prompt_"):
            value = value[:, first:]
        elif isinstance(value, Tensor) and value.dim() >= 2:
            value = value[:, :columns]
        elif f.name == "evidence":
            value = {k: v[:, :columns] if v.dim() >= 2 else v for k, v in value.items()}
        trimmed[f.name] = value
    return Rollouts(**trimmed)


def response_columns(rollouts: Rollouts) -> int:
    """Return the number of response columns up to the last one in use in any row (at least 1 where there are some)."""
    used = (rollouts.valid | rollouts.mask).any(dim=0).nonzero()
    return int(used[-1]) + 1 if len(used) else min(1, rollouts.mask.shape[1])


def without_holes(rollouts: Rollouts) -> tuple[Rollouts, Tensor | None]:
    """Return (the rollouts as a model should compute them, places (B,T+1) for `at_places`, or None without holes).

    A row of `valid` with a hole (a token in its midst that the models do not attend to) is moved together to the left:
    at the hole's own column there is no state from which the next token could be predicted. Only ids and `valid` move.
    """
    valid = rollouts.valid
    if valid.shape[1] < 2 or not (valid[:, 1:] & ~valid[:, :-1]).any():
        return rollouts, None
    order = (~valid).to(torch.uint8).argsort(dim=1, stable=True)
    moved = replace(rollouts, response_ids=rollouts.response_ids.gather(1, order), valid=valid.gather(1, order))
    return moved, torch.nn.functional.pad(valid.cumsum(dim=1), (1, 0))


def at_places(states: Tensor, places: Tensor | None) -> Tensor:
    """Return states (B,T+1,…) of rollouts `without_holes` at the places of the original ones.

    Entry t is the state from which response token t is predicted: after the last token before t that is attended to.
    """
    if places is None:
        return states
    index = places.reshape(*places.shape, *([1] * (states.dim() - 2))).expand(-1, -1, *states.shape[2:])
    return states.gather(1, index)


def untrimmed(produced: Mapping[str, Tensor], columns: int, length: int) -> dict[str, Tensor]:
    """Return tensors (b,columns,…) of trimmed rollouts, padded with zeros to `length` columns."""
    if columns == length:
        return dict(produced)
    return {
        name: torch.cat([t, t.new_zeros(len(t), length - columns, *t.shape[2:])], dim=1) if t.dim() >= 2 else t
        for name, t in produced.items()
    }
