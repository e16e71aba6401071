"""Sampling of one id a row from logits: the inverse cumulative distribution in two levels, one uniform a row."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from apportion.errors import ModelError

BELOW_ONE = 1.0 - 2.0**-53  # the largest float64 below 1: its product with a sum is below the sum


def draw(logits: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """Return one id a row (B,) int64 and its log-probability (B,) float32, from float32 logits (B,V) and uniforms (B,).

    The id is the first whose cumulative probability exceeds its row's uniform (float64, in [0,1)): sums of blocks of
    about √V ids choose a block, and the sums within it an id, both in float64. So one pass over V in float32 is enough,
    and no id of probability 0 is ever sampled. A row with NaN logits gets an arbitrary id and log-probability NaN;
    `check_logprobs` raises for it.
    """
    p = logits.softmax(dim=-1)
    size = 1 << math.ceil(math.log2(max(p.shape[1], 1)) / 2)
    covered = p.shape[1] // size * size
    sums = p[:, :covered].unflatten(1, (-1, size)).sum(dim=-1)
    if covered < p.shape[1]:
        sums = torch.cat([sums, p[:, covered:].sum(dim=-1, keepdim=True)], dim=1)
    block, rest, total = _invert(sums.double(), uniforms[:, None])
    ids = block * size + torch.arange(size, device=p.device)  # (B,size), the last block's may lie beyond V
    inside = p.gather(1, ids.clamp_max(p.shape[1] - 1)).double().masked_fill(ids >= p.shape[1], 0.0)
    within, _, _ = _invert(inside, rest)
    chosen = (block * size + within).clamp_max(p.shape[1] - 1)
    return chosen.squeeze(1), (p.gather(1, chosen).double() / total).log().float().squeeze(1)


def _invert(mass: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return (first index whose cumulative mass exceeds its uniform's share, remainder of the uniform, the sum).

    Shapes: mass (B,N) and uniforms (B,1) float64; all three (B,1). The remainder is uniform in [0,1).
    """
    cumulative = mass.cumsum(dim=1)
    total = cumulative[:, -1:].contiguous()
    target = uniforms * total
    place = torch.searchsorted(cumulative, target, right=True).clamp_max(mass.shape[1] - 1)
    own = mass.gather(1, place)
    rest = (target - (cumulative.gather(1, place) - own)) / own
    return place, rest.clamp(0.0, BELOW_ONE), total


def allowed_(logits: Tensor, banned: Tensor, temperature: float) -> Tensor:
    """Return the result of `Policy.allowed`, float32 logits (B,V) over the temperature and −inf on `banned` (N,) ids.

    float32 logits are overwritten.
    """
    logits = logits.float()
    if temperature != 1.0:
        logits.div_(temperature)
    return logits.index_fill_(-1, banned, -torch.inf)


def check_logprobs(logprobs: Tensor, rollouts: Tensor) -> None:
    """Raise ModelError if a sampled token's log-probability (B,) is not finite.

    Args:
        rollouts: (B,) the rollout of each row, for the error.
    """
    bad = ~torch.isfinite(logprobs)
    if bad.any():
        row = int(bad.nonzero()[0])
        fix = "Check its weights; if it was trained here, it diverged: lower optim.lr."
        field = f"policy's log-probabilities in rollout {int(rollouts[row])}"
        raise ModelError(field, float(logprobs[row]), "finite numbers", fix)
