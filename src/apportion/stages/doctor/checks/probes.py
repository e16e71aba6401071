"""Small batches for checks of real models (padded, single rows, random ids), and the tolerances of comparisons."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from apportion.generation.given import given_rollouts
from apportion.models.policy import Policy
from apportion.types import Rollouts

PROMPTS = 8  # prompts to sample from
TOKENS = 64  # most new tokens a prompt
BOS_GAIN = 0.5  # nats a token that BOS may gain
# (ok up to, fail above) by the dtype of the computation: mean |Δ log p| in nats a token, and |Δ score| in its sd
LOGPROB = {torch.float32: (1e-4, 1e-2), torch.bfloat16: (0.05, 0.25), torch.float16: (0.01, 0.1)}
SCORE = {torch.float32: (1e-3, 1e-2), torch.bfloat16: (0.1, 0.5), torch.float16: (0.02, 0.2)}
ATTENTION = {torch.float32: (1e-4, 1e-2), torch.bfloat16: (0.02, 0.1), torch.float16: (5e-3, 0.05)}


def with_padding(rollouts: Rollouts, fill: int, left: int, right: int) -> Rollouts:
    """Return `rollouts` with `left` more prompt columns and `right` more response columns of padding."""
    changes: dict[str, Tensor] = {}
    for name in (f.name for f in fields(rollouts)):
        value = getattr(rollouts, name)
        if isinstance(value, Tensor) and value.dim() == 2:
            sides = (left, 0) if name.startswith("prompt") else (0, right)
            changes[name] = pad(value, sides, value=fill if name.endswith("_ids") else 0)
    return replace(rollouts, **changes, evidence={})


def single_row(rollouts: Rollouts, row: int) -> Rollouts:
    """Return one rollout without padding, as a batch of one."""
    one = rollouts.select(torch.tensor([row], device=rollouts.mask.device))
    width = int(one.prompt_mask.sum())
    length = int((one.valid.long() * torch.arange(1, one.valid.shape[1] + 1, device=one.valid.device)).max())
    changes: dict[str, Tensor] = {}
    for name in (f.name for f in fields(one)):
        value = getattr(one, name)
        if isinstance(value, Tensor) and value.dim() == 2:
            changes[name] = value[:, -width:] if name.startswith("prompt") else value[:, :length]
    return replace(one, **changes, evidence={})


def random_rollouts(prompts: Sequence[Sequence[int]], policy: Policy) -> Rollouts:
    """Return rollouts with responses of 2 to 9 tokens, sampled uniformly from the ids that the policy may generate."""
    generator = torch.Generator().manual_seed(0)
    excluded = {*policy.banned, policy.pad}
    allowed = torch.tensor([i for i in range(len(policy.tokenizer)) if i not in excluded])
    responses = [allowed[torch.randint(len(allowed), (2 + i % 8,), generator=generator)] for i in range(len(prompts))]
    return given_rollouts(prompts, [row.tolist() for row in responses], policy.pad, policy.device)


def difference(one: Tensor, other: Tensor, mask: Tensor) -> float:
    """Return mean |one − other| on the mask; NaN where either is not finite there."""
    return float((one.float() - other.float()).abs()[mask].mean())
