"""Your own credit methods: one that spreads the score, with its own evidence, and one that subtracts a penalty.

With PYTHONPATH=examples, for any reward model RM:

    apportion rl --reward_model RM --credit own_credit:words
    apportion rl --reward_model RM --credit "[attention, own_credit:repetition, kl_penalty]"
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from apportion import Credit, Rollouts
from apportion.credit import redistributor
from apportion.types import State

LETTERS = f"{__name__}:letters"  # evidence by import path: `letters` below produces it


def words(*, mix: float = 0.8) -> Credit:
    """Return r_t = β·Σr/n on the n tokens that hold a letter, (1−β)·r_t besides: punctuation gets nothing.

    A row without letters falls back to uniform shares, which is counted. Not causal: n depends on later tokens.
    """

    def weights(rollouts: Rollouts) -> Tensor:
        return rollouts.token_evidence(LETTERS, least=0.0)

    return redistributor(weights, mix=mix, needs=frozenset({LETTERS}), causal=False)


def letters(models: Any, rollouts: Rollouts, texts: Sequence[str]) -> Tensor:
    """Return (B,T) float, 1 where a response token holds a letter. `texts` are the decoded responses."""
    decode = models.policy.tokenizer.decode
    rows = [[any(c.isalpha() for c in decode([i])) for i in ids] for ids in rollouts.response_ids.tolist()]
    return torch.tensor(rows, dtype=torch.float32, device=rollouts.mask.device)


def repetition(*, cost: float = 0.1) -> Credit:
    """Return r_t − cost where the pair of tokens (t−1, t) occurred before in the same response.

    Causal, but it changes the return, so `keeps_return` is False and it comes after redistributors in a chain.
    """

    def assign(rollouts: Rollouts, rewards: Tensor, state: State) -> tuple[Tensor, State]:
        paid = torch.where(rollouts.mask, rewards.float() - cost * repeated(rollouts), 0.0)
        return paid.to(rewards.dtype), state

    def stats(rollouts: Rollouts, before: Tensor, after: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        return {"credit/repetition/rate": (repeated(rollouts).sum(), rollouts.mask.sum().float())}

    return Credit(dict, assign, frozenset(), keeps_return=False, causal=True, stats=stats)


def repeated(rollouts: Rollouts) -> Tensor:
    """Return (B,T) float, 1 on sampled tokens that repeat an earlier pair of neighbours of their row, else 0."""
    ids, mask = rollouts.response_ids, rollouts.mask
    pairs = torch.stack([ids[:, :-1], ids[:, 1:]], dim=-1)
    real = mask[:, :-1] & mask[:, 1:]
    same = (pairs[:, :, None] == pairs[:, None]).all(dim=-1) & real[:, :, None] & real[:, None]  # (B,T-1,T-1)
    return torch.nn.functional.pad(same.tril(-1).any(dim=-1).float(), (1, 0))
