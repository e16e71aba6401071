"""Decoding without a cache: every step computes the whole text of every row."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from apportion.generation.key_values import Past
from apportion.generation.step_model import StepModel
from apportion.models.policy import Policy, contiguous_head


class Texts:
    """The ids of the rows in the batch instead of their past: (n,L), padded on the left, and their mask."""

    open = True

    def __init__(self) -> None:
        self.ids = torch.zeros(0, 0, dtype=torch.int64)
        self.seen = torch.zeros(0, 0, dtype=torch.bool)

    def add_rows(self, prefilled: Tensor, seen: Tensor, source: Tensor) -> None:
        """See `Past.add_rows`; `prefilled` are the prompts' ids (N,W)."""
        self.ids, self.seen = (
            _below(old.to(new.device), new[source]) for old, new in ((self.ids, prefilled), (self.seen, seen))
        )

    def keep_rows(self, rows: Tensor) -> None:
        """See `Past.keep_rows`. Columns that no remaining row uses are freed."""
        ids, seen = self.ids[rows], self.seen[rows]
        first = int((~seen.any(dim=0)).int().cumprod(dim=0).sum()) if len(rows) else seen.shape[1]
        self.ids, self.seen = ids[:, first:], seen[:, first:]

    def next_column(self, tokens: Tensor) -> None:
        """Append one token a row (n,), which is part of the text."""
        self.ids = torch.cat([self.ids, tokens[:, None]], dim=1)
        self.seen = torch.cat([self.seen, torch.ones_like(tokens, dtype=torch.bool)[:, None]], dim=1)


class RecomputeStepModel(StepModel):
    """A `StepModel` for a model whose past is in no cache that rows can enter and leave: slow, and exact.

    T new tokens cost T forwards of the whole text.

    Args: as `StepModel`.
    """

    def __init__(self, policy: Policy, model: Any, rows: int, longest: int) -> None:
        self.policy, self.model = policy, model
        self.texts = Texts()
        self.past: Past = self.texts

    def prefill(self, ids: Tensor, mask: Tensor, source: Tensor) -> Tensor:
        """See `StepModel.prefill`."""
        logits = self._whole(ids, mask)
        self.texts.add_rows(ids, mask, source)
        return logits[source]

    def step(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """See `StepModel.step`."""
        self.texts.next_column(tokens)
        return self._whole(self.texts.ids, self.texts.seen)

    def _whole(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Return the logits (n,V) after texts (n,L)."""
        positions = (mask.cumsum(dim=1) - 1).clamp_min(0)
        inputs = {"input_ids": ids, "attention_mask": mask.long(), "position_ids": positions}
        with contiguous_head(self.model):
            logits: Tensor = self.model(**inputs, use_cache=False, logits_to_keep=1).logits
        return logits[:, -1]


def _below(old: Tensor, new: Tensor) -> Tensor:
    """Return the rows of `old` (n,L) and, below them, of `new` (m,W), zeros on the left of the shorter ones."""
    if not len(old):
        return new
    width = max(old.shape[1], new.shape[1])
    return torch.cat([torch.nn.functional.pad(t, (width - t.shape[1], 0)) for t in (old, new)])
