"""How a model writes: it reads prompts, then one token of every row at a time, as any transformers model can."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from apportion.generation.key_values import Buffers
from apportion.models.policy import Policy, contiguous_head


class StepModel:
    """A model that writes by its own forward, with the past of the rows in the batch.

    Args:
        policy: whose model or reference it is.
        model: the causal language model.
        rows: most rows at a time.
        longest: most tokens of a prompt and its response.
    """

    def __init__(self, policy: Policy, model: Any, rows: int, longest: int) -> None:
        from apportion.generation.hf_cache import past_of

        self.policy, self.model = policy, model
        self.past = past_of(model, rows, longest)
        self.cache: Any = None

    def read(self, ids: Tensor, mask: Tensor, source: Tensor) -> Tensor:
        """Read prompts (N,W), left-padded; row i of those that enter has read prompt source[i]. Return logits (n,V)."""
        from apportion.generation.hf_cache import empty_cache

        cache = empty_cache(self.model, self.past)
        positions = (mask.cumsum(dim=1) - 1).clamp_min(0)
        logits = self._forward(ids, mask, positions, cache)
        self.past.enter(cache, mask, source)
        return logits[source]

    def step(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Read one token of every row (n,) at its position (n,); return the logits of the next (n,V)."""
        from apportion.generation.hf_cache import cache_over

        self.past.next_column()
        if isinstance(self.past, Buffers):
            self.cache = cache_over(self.past) if self.cache is None else self.cache
            mask, cache = self.past.seen[: self.past.rows, : self.past.used], self.cache
        else:
            mask, cache = self.past.seen, self.past.cache
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


def spare(device: torch.device) -> int:
    """Return how many columns that nobody sees stand before the prompts: one on a CPU.

    Without any padding transformers gives sdpa no mask, and there grouped queries then take a kernel that needs 96 ms a
    step where the one with a mask needs 60 (SmolLM2-135M, 64 rows).
    """
    return 1 if device.type == "cpu" else 0
