"""Log-probabilities of chosen tokens straight from the states under the output layer, a block of positions at a time.

The logits of a batch are its largest tensor: n·V numbers, and a softmax of them in float32 takes four times as much
again. Here they exist for one block of positions, are kept in the model's own dtype only while they are few, and are
computed a second time in the backward pass otherwise.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

BLOCK_ELEMENTS = 1 << 24  # logits at once: 32 MiB in 16 bit
ROWS_ELEMENTS = 1 << 21  # logits at once in float32: 8 MiB, which a processor's cache holds
KEPT_ELEMENTS = 1 << 26  # logits kept for the backward pass: 128 MiB in 16 bit; more are computed again


def token_logprobs(
    states: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    banned: Tensor,
    temperature: float = 1.0,
    entropy: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Return (log softmax(logits/temperature) at `ids` (n,) float32, its entropy (n,) in nats or None).

    logits = states · weightᵀ + bias, −inf on the banned ids. The entropy carries no gradient.

    Args:
        states: (n,d); weight: (V,d); bias: (V,) or None; ids: (n,) int64, none of them banned; banned: (k,) int64.
    """
    found = _TokenLogprobs.apply(states, weight, bias, ids, banned, temperature, entropy)  # type: ignore[no-untyped-call]
    return found[0], found[1] if entropy else None


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        ids: Tensor,
        banned: Tensor,
        temperature: float,
        entropy: bool,
    ) -> tuple[Tensor, Tensor]:
        count, vocabulary = len(states), len(weight)
        normaliser, chosen, spread = (states.new_zeros(count, dtype=torch.float32) for _ in range(3))
        learns = any(ctx.needs_input_grad[:3])
        keep = learns and count * vocabulary <= KEPT_ELEMENTS
        kept: list[Tensor] = []
        for block in _blocks(count, vocabulary, BLOCK_ELEMENTS):
            logits = block_logits(states[block], weight, bias, banned)
            chosen[block] = logits.gather(1, ids[block, None]).squeeze(1).float() / temperature
            for part in _blocks(len(logits), vocabulary, ROWS_ELEMENTS):
                here = slice(block.start + part.start, block.start + part.stop)
                normaliser[here], spread[here] = log_sum(logits[part], temperature, entropy)
            if keep:
                kept.append(logits)
        ctx.save_for_backward(states, weight, bias, ids, banned, normaliser, *kept)
        ctx.temperature = temperature
        ctx.mark_non_differentiable(spread)
        return chosen - normaliser, spread

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        states, weight, bias, ids, banned, normaliser, *kept = ctx.saved_tensors
        gradient = gradients[0].float() / ctx.temperature  # (n,)
        to_states, to_weight, to_bias = ctx.needs_input_grad[:3]
        d_states = torch.empty_like(states) if to_states else None
        d_weight = torch.zeros_like(weight) if to_weight else None
        d_bias = torch.zeros_like(bias, dtype=torch.float32) if to_bias else None
        for number, block in enumerate(_blocks(len(states), len(weight), BLOCK_ELEMENTS)):
            logits = kept[number] if kept else block_logits(states[block], weight, bias, banned)
            d_logits = logits_gradient(logits, ids[block], normaliser[block], gradient[block], ctx.temperature)
            if d_states is not None:
                torch.mm(d_logits, weight, out=d_states[block])
            if d_weight is not None:
                d_weight.addmm_(d_logits.T, states[block])
            if d_bias is not None:
                d_bias += d_logits.sum(dim=0, dtype=torch.float32)
        d_bias = None if d_bias is None else d_bias.to(bias.dtype)
        return d_states, d_weight, d_bias, None, None, None, None


def block_logits(states: Tensor, weight: Tensor, bias: Tensor | None, banned: Tensor) -> Tensor:
    """Return the logits (n,V) of `states` (n,d) in their dtype, −inf on the banned ids."""
    logits = torch.nn.functional.linear(states, weight, bias)
    return logits.index_fill_(1, banned, -torch.inf)


def log_sum(logits: Tensor, temperature: float, entropy: bool) -> tuple[Tensor, Tensor | float]:
    """Return (log Σ exp, entropy in nats or 0) of softmax(logits/temperature), rows (n,V) -> (n,), with one exp."""
    wide = logits.float()  # a copy where the logits are 16 bit, and left as it is where they are not
    peak = wide.amax(dim=-1, keepdim=True)
    shifted = wide - peak if wide is logits else wide.sub_(peak)
    shifted = shifted if temperature == 1.0 else shifted.div_(temperature)
    weights = shifted.exp()
    mass = weights.sum(dim=-1)
    total = peak.squeeze(-1) / temperature + mass.log()
    if not entropy:
        return total, 0.0
    shifted.clamp_min_(-1e4)  # −inf has no weight, and 0·−inf is no number
    return total, mass.log() - torch.linalg.vecdot(weights, shifted) / mass


def logits_gradient(logits: Tensor, ids: Tensor, normaliser: Tensor, gradient: Tensor, temperature: float) -> Tensor:
    """Return g·(1[v = id] − softmax(logits/temperature)) (n,V), in place of `logits` and in their dtype."""
    scaled = normaliser * temperature
    for part in _blocks(len(logits), logits.shape[1], ROWS_ELEMENTS):
        wide = logits[part].float().sub_(scaled[part, None])
        wide = (wide if temperature == 1.0 else wide.div_(temperature)).exp_().mul_(-gradient[part, None])
        rows = torch.arange(len(wide), device=wide.device)
        wide[rows, ids[part]] += gradient[part]
        logits[part] = wide
    return logits


def _blocks(count: int, width: int, elements: int) -> list[slice]:
    """Return slices that cut `count` rows of `width` into blocks of at most `elements` (one row at least)."""
    rows = max(1, elements // width)
    return [slice(first, min(count, first + rows)) for first in range(0, count, rows)]
