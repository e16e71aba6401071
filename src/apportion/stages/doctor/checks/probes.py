"""Rows for the probes of real models: widened with pads, one by one, and how far two readings of them may differ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from apportion.generation.decode import left_pad
from apportion.models.policy import Policy
from apportion.types import Rollouts

SHOWN = 8  # prompts that are sampled on
TOKENS = 64  # most new tokens of each
BEGUN = 0.5  # nats a token that a beginning-of-text token may win
# (ok up to, fail beyond) by the dtype that computes: mean |Δ log p| in nats a token, and |Δ score| in its sd
LOGPROB = {torch.float32: (1e-4, 1e-2), torch.bfloat16: (0.05, 0.25), torch.float16: (0.01, 0.1)}
SCORE = {torch.float32: (1e-3, 1e-2), torch.bfloat16: (0.1, 0.5), torch.float16: (0.02, 0.2)}
ATTENTION = {torch.float32: (1e-4, 1e-2), torch.bfloat16: (0.02, 0.1), torch.float16: (5e-3, 0.05)}


def widened(rollouts: Rollouts, fill: int, left: int, right: int) -> Rollouts:
    """Return `rollouts` with `left` more prompt columns and `right` more response columns of pads."""
    changes: dict[str, Tensor] = {}
    for name in (f.name for f in fields(rollouts)):
        value = getattr(rollouts, name)
        if isinstance(value, Tensor) and value.dim() == 2:
            sides = (left, 0) if name.startswith("prompt") else (0, right)
            changes[name] = pad(value, sides, value=fill if name.endswith("_ids") else 0)
    return replace(rollouts, **changes, evidence={})


def alone(rollouts: Rollouts, row: int) -> Rollouts:
    """Return one rollout without a pad on either side, as a batch of one."""
    one = rollouts.select(torch.tensor([row], device=rollouts.mask.device))
    width = int(one.prompt_mask.sum())
    length = int((one.valid.long() * torch.arange(1, one.valid.shape[1] + 1, device=one.valid.device)).max())
    changes: dict[str, Tensor] = {}
    for name in (f.name for f in fields(one)):
        value = getattr(one, name)
        if isinstance(value, Tensor) and value.dim() == 2:
            changes[name] = value[:, -width:] if name.startswith("prompt") else value[:, :length]
    return replace(one, **changes, evidence={})


def made_up(prompts: Sequence[Sequence[int]], policy: Policy) -> Rollouts:
    """Return rollouts whose responses, of 2 to 9 tokens, are drawn evenly from the ids that the policy may write."""
    generator = torch.Generator().manual_seed(0)
    unwritten = {*policy.banned, policy.tokenizer.pad_token_id}
    allowed = torch.tensor([i for i in range(len(policy.tokenizer)) if i not in unwritten])
    drawn = [allowed[torch.randint(len(allowed), (2 + i % 8,), generator=generator)] for i in range(len(prompts))]
    return given(prompts, [row.tolist() for row in drawn], policy)


def given(prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], policy: Policy) -> Rollouts:
    """Return rollouts of these ids, none of them sampled: their log-probabilities are 0."""
    fill, device = policy.tokenizer.pad_token_id, policy.device
    ids, seen = left_pad(prompts, fill)
    width = max(map(len, responses))
    after = torch.tensor([[*row, *[fill] * (width - len(row))] for row in responses], dtype=torch.int64)
    mask = torch.arange(width) < torch.tensor([[len(row)] for row in responses])
    return Rollouts(
        prompt_ids=ids.to(device),
        prompt_mask=seen.to(device),
        response_ids=after.to(device),
        mask=mask.to(device),
        logprobs=torch.zeros(mask.shape, device=device),
        group=torch.arange(len(prompts), device=device),
    )


def joined(rollouts: Rollouts) -> tuple[Tensor, Tensor]:
    """Return (ids, mask), both (B,P+T), of prompt and response together."""
    ids = torch.cat([rollouts.prompt_ids, rollouts.response_ids], dim=1)
    return ids, torch.cat([rollouts.prompt_mask, rollouts.valid], dim=1)


def difference(one: Tensor, other: Tensor, mask: Tensor) -> float:
    """Return mean |one − other| on the mask; NaN where either is no finite number there."""
    return float((one.float() - other.float()).abs()[mask].mean())
