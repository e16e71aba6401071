"""Log-probabilities of chosen tokens from the states under the output layer, a block of positions at a time.

The logits of a batch are its largest tensor: n·V numbers, and a softmax of them in float32 takes four times as much in
addition. Here they exist for one block of positions; a small batch saves them in the model's own dtype for the backward
pass, a larger one recomputes them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from apportion.models.fast.onednn import linear, product

BLOCK_ELEMENTS = 1 << 24  # logits at once: 32 MiB in 16 bit
ROWS_ELEMENTS = 1 << 21  # logits at once in float32: 8 MiB, which a processor's cache holds
SAVED_ELEMENTS = 1 << 26  # logits saved for the backward pass: 128 MiB in 16 bit; more are recomputed


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
    result = _TokenLogprobs.apply(states, weight, bias, ids, banned, temperature, entropy)  # type: ignore[no-untyped-call]
    return result[0], result[1] if entropy else None


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
        normaliser, chosen, entropies = (states.new_zeros(count, dtype=torch.float32) for _ in range(3))
        needs_gradient = any(ctx.needs_input_grad[:3])
        save = needs_gradient and count * vocabulary <= SAVED_ELEMENTS
        saved: list[Tensor] = []
        for block in _blocks(count, vocabulary, BLOCK_ELEMENTS):
            logits = block_logits(states[block], weight, bias, banned)
            chosen[block] = logits.gather(1, ids[block, None]).squeeze(1).float() / temperature
            for part in _blocks(len(logits), vocabulary, ROWS_ELEMENTS):
                here = slice(block.start + part.start, block.start + part.stop)
                normaliser[here], entropies[here] = log_sum(logits[part], temperature, entropy)
            if save:
                saved.append(logits)
        ctx.save_for_backward(states, weight, bias, ids, banned, normaliser, *saved)
        ctx.temperature = temperature
        ctx.mark_non_differentiable(entropies)
        return chosen - normaliser, entropies

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        states, weight, bias, ids, banned, normaliser, *saved = ctx.saved_tensors
        gradient = gradients[0].float() / ctx.temperature  # (n,)
        to_states, to_weight, to_bias = ctx.needs_input_grad[:3]
        d_states = torch.empty_like(states) if to_states else None
        d_weight: Tensor | None = None
        d_bias = torch.zeros_like(bias, dtype=torch.float32) if to_bias else None
        for number, block in enumerate(_blocks(len(states), len(weight), BLOCK_ELEMENTS)):
            logits = saved[number] if saved else block_logits(states[block], weight, bias, banned)
            d_logits = logits_gradient(logits, ids[block], normaliser[block], gradient[block], ctx.temperature)
            if d_states is not None:
                d_states[block] = product(d_logits, weight)
            if to_weight and d_weight is None:  # no zeros first: the largest weight of all
                d_weight = d_logits.T @ states[block]
            elif d_weight is not None:
                d_weight.addmm_(d_logits.T, states[block])
            if d_bias is not None:
                d_bias += d_logits.sum(dim=0, dtype=torch.float32)
        if to_weight and d_weight is None:  # no position
            d_weight = torch.zeros_like(weight)
        d_bias = None if d_bias is None else d_bias.to(bias.dtype)
        return d_states, d_weight, d_bias, None, None, None, None


def block_logits(states: Tensor, weight: Tensor, bias: Tensor | None, banned: Tensor) -> Tensor:
    """Return the logits (n,V) of `states` (n,d) in their dtype, −inf on the banned ids."""
    logits = linear(states, weight, bias)
    return logits.index_fill_(1, banned, -torch.inf)


def log_sum(logits: Tensor, temperature: float, entropy: bool) -> tuple[Tensor, Tensor | float]:
    """Return (log Σ exp, entropy in nats or 0) of softmax(logits/temperature), rows (n,V) -> (n,), with one exp."""
    wide = logits.float()  # a copy of 16-bit logits, which may be overwritten; float32 logits may not
    peak = wide.amax(dim=-1, keepdim=True)
    shifted = wide - peak if wide is logits else wide.sub_(peak)
    shifted = shifted if temperature == 1.0 else shifted.div_(temperature)
    weights = shifted.exp()
    mass = weights.sum(dim=-1)
    total = peak.squeeze(-1) / temperature + mass.log()
    if not entropy:
        return total, 0.0
    shifted.clamp_min_(-1e4)  # −inf has weight 0, and 0·−inf is NaN
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
