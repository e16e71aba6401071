"""Drawing one id a row from logits: the inverse of the cumulative distribution, in two levels, one uniform a row."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from apportion.errors import ModelError

BELOW_ONE = 1.0 - 2.0**-53  # the largest float64 below 1: times any sum it is below that sum


def draw(logits: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """Return one id a row (B,) int64 and its log-probability (B,) float32, from float32 logits (B,V) and uniforms (B,).

    The id is the first whose cumulative probability exceeds its row's uniform (float64, in [0,1)): sums of blocks of
    about √V ids choose a block, and the sums within it an id, both in float64. So one pass over V in float32 is enough,
    and no id of probability 0 is ever drawn. A row whose logits are not numbers gives some id and the log-probability
    NaN; `refuse_unlike_numbers` is for it.
    """
    p = logits.softmax(dim=-1)
    size = 1 << math.ceil(math.log2(max(p.shape[1], 1)) / 2)
    whole = p.shape[1] // size * size
    sums = p[:, :whole].unflatten(1, (-1, size)).sum(dim=-1)
    if whole < p.shape[1]:
        sums = torch.cat([sums, p[:, whole:].sum(dim=-1, keepdim=True)], dim=1)
    block, rest, total = _invert(sums.double(), uniforms[:, None])
    ids = block * size + torch.arange(size, device=p.device)  # (B,size), the last block's may lie beyond V
    inside = p.gather(1, ids.clamp_max(p.shape[1] - 1)).double().masked_fill(ids >= p.shape[1], 0.0)
    within, _, _ = _invert(inside, rest)
    chosen = (block * size + within).clamp_max(p.shape[1] - 1)
    return chosen.squeeze(1), (p.gather(1, chosen).double() / total).log().float().squeeze(1)


def _invert(mass: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return (first place whose cumulative mass exceeds its uniform's share, what is left of the uniform, the sum).

    Shapes: mass (B,N) and uniforms (B,1) float64; all three (B,1). What is left is uniform in [0,1) again.
    """
    cumulative = mass.cumsum(dim=1)
    total = cumulative[:, -1:].contiguous()
    target = uniforms * total
    place = torch.searchsorted(cumulative, target, right=True).clamp_max(mass.shape[1] - 1)
    own = mass.gather(1, place)
    rest = (target - (cumulative.gather(1, place) - own)) / own
    return place, rest.clamp(0.0, BELOW_ONE), total


def allowed_(logits: Tensor, banned: Tensor, temperature: float) -> Tensor:
    """Return what `Policy.allowed` does, float32 logits (B,V) over the temperature and −inf on `banned` (N,) ids.

    The logits are overwritten where they are float32 already.
    """
    logits = logits.float()
    if temperature != 1.0:
        logits.div_(temperature)
    return logits.index_fill_(-1, banned, -torch.inf)


def refuse_unlike_numbers(logprobs: Tensor, rollouts: Tensor) -> None:
    """Raise ModelError for the first of the drawn tokens' log-probabilities (B,) that is no finite number.

    Args:
        rollouts: (B,) the number of each row's rollout, for the message.
    """
    bad = ~torch.isfinite(logprobs)
    if bad.any():
        row = int(bad.nonzero()[0])
        fix = "Check its weights; if it was trained here, it diverged: lower optim.lr."
        field = f"policy's log-probabilities in rollout {int(rollouts[row])}"
        raise ModelError(field, float(logprobs[row]), "finite numbers", fix)
