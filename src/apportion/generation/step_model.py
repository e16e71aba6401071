"""Prefill and decoding steps of a batch by any transformers model's own forward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from apportion.generation.key_values import KeyValueBuffers, Past
from apportion.models.policy import Policy, contiguous_head


class StepModel:
    """A causal language model with the key-value cache of the rows in the batch.

    Args:
        policy: the policy that the model or reference belongs to.
        model: the causal language model.
        rows: largest number of rows.
        longest: largest number of tokens of a prompt and its response.
    """

    def __init__(self, policy: Policy, model: Any, rows: int, longest: int) -> None:
        from apportion.generation.hf_cache import empty_past

        self.policy, self.model = policy, model
        self.columns = empty_past(model, rows, longest)
        self.past: Past = self.columns
        self.cache: Any = None

    def prefill(self, ids: Tensor, mask: Tensor, source: Tensor) -> Tensor:
        """Compute prompts (N,W), left-padded; add rows, row i with prompt source[i] (n,). Return their logits (n,V)."""
        from apportion.generation.hf_cache import empty_cache

        cache = empty_cache(self.model, self.columns)
        positions = (mask.cumsum(dim=1) - 1).clamp_min(0)
        logits = self._forward(ids, mask, positions, cache)
        self.past.add_rows(cache, mask, source)
        return logits[source]

    def step(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Compute one token of every row (n,) at its position (n,); return the logits of the next (n,V)."""
        from apportion.generation.hf_cache import cache_over

        past = self.columns
        past.next_column()
        if isinstance(past, KeyValueBuffers):
            self.cache = cache_over(past) if self.cache is None else self.cache
            mask, cache = past.seen[: past.rows, : past.used], self.cache
        else:
            mask, cache = past.seen, past.cache
        return self._forward(tokens[:, None], mask, positions[:, None], cache)

    def _forward(self, ids: Tensor, mask: Tensor, positions: Tensor, cache: Any) -> Tensor:
        with contiguous_head(self.model):
            out = self.model(
                input_ids=ids,
                attention_mask=mask.long(),
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
        logits: Tensor = out.logits[:, -1]
        return logits


def extra_padding(device: torch.device) -> int:
    """Return the number of masked columns before the prompts: one on a CPU.

    Without any padding transformers passes sdpa no mask, and grouped queries then use a kernel that takes 96 ms a step
    on a CPU instead of 60 (SmolLM2-135M, 64 rows).
    """
    return 1 if device.type == "cpu" else 0
