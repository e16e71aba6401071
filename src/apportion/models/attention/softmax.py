"""Softmax rows of one attention layer from its inputs: masks, soft-caps, sinks, biases and windows.

Shapes: B rows of the batch, R chosen positions, H heads, KV key-value heads, Q queries, K keys, D head size.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from apportion.errors import ModelError

# largest difference of a layer's own output from weights·values, relative to the values: rounding only
ROUNDING = 0.01  # a GPU may multiply float32 in TF32
ROUNDING_16_BIT = 0.25


class Call(NamedTuple):
    """The inputs and the output of one attention layer.

    Attributes:
        module: the layer.
        query: (B,H,Q,D), key: (B,KV,K,D), value: (B,KV,K,Dv), all after rotary embedding and norms.
        mask: (B,1 or H,Q,K) bool or additive, (B,K) of real tokens, a flex BlockMask, or None.
        settings: the other arguments by name (scaling, softcap, sliding_window, s_aux, is_causal, …).
        output: (B,Q,H,Dv), weights times values; None where it cannot be captured.
        bias: (B,H,K), added to every query's scores (ALiBi); None without one.
    """

    module: nn.Module
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Any
    settings: dict[str, Any]
    output: Tensor | None = None
    bias: Tensor | None = None


def is_causal(call: Call) -> bool:
    """Whether a query of this layer attends to no later key, where the mask does not show it."""
    stated = call.settings.get("is_causal")
    return bool(getattr(call.module, "is_causal", True) if stated is None else stated)


def softmax_rows(call: Call, rows: Tensor) -> Tensor:
    """Return softmax rows (B,R,H,K) float32 at query positions `rows` (B,R): O(H·R·K·D), no (Q,K) matrix."""
    batch, heads, _, size = call.query.shape
    kv_heads, keys = call.key.shape[1:3]
    index = rows[:, None, :, None].expand(-1, heads, -1, size)
    query = call.query.gather(2, index).float()  # (B,H,R,D)
    # head h uses key-value head h // (H / KV): group the heads rather than repeat the keys
    query = query.reshape(batch, kv_heads, heads // kv_heads * rows.shape[1], size)
    scaling = call.settings.get("scaling")
    with torch.autocast(query.device.type, enabled=False):
        scores = query @ call.key.float().transpose(2, 3) * (size**-0.5 if scaling is None else scaling)
    scores = scores.reshape(batch, heads, rows.shape[1], keys).transpose(1, 2)
    cap = call.settings.get("softcap")
    scores = scores if cap is None else torch.tanh(scores / cap) * cap
    scores = scores if call.bias is None else scores + call.bias[:, None].float()
    visible, bias = _mask_rows(call, rows)
    scores = (scores if bias is None else scores + bias).masked_fill(~visible, -torch.inf)
    sinks = call.settings.get("s_aux")
    if sinks is not None:  # one more logit a head, which takes mass and is then dropped
        column = sinks.detach().float().reshape(1, 1, -1, 1).expand(*scores.shape[:-1], 1)
        return torch.cat([scores, column], dim=-1).softmax(dim=-1)[..., :-1]
    # a fully masked row has no mass; a NaN of the model stays NaN
    weights: Tensor = scores.softmax(dim=-1).masked_fill(~visible.any(dim=-1, keepdim=True), 0.0)
    return weights


def _mask_rows(call: Call, rows: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return (visible keys of each row (B or 1,R,H or 1,K) bool, additive bias of that shape or None)."""
    mask = call.mask
    if mask is None or (isinstance(mask, Tensor) and mask.dim() == 2):
        return _implied_rows(call, rows), None
    if isinstance(mask, Tensor) and mask.dim() == 4:
        keys, queries = call.key.shape[2], call.query.shape[2]
        mask = mask[..., :keys].expand(len(rows), -1, queries, -1)
        index = rows[:, None, :, None].expand(-1, mask.shape[1], -1, keys)
        chosen = mask.gather(2, index).transpose(1, 2)  # (B,R,1 or H,K)
        if chosen.dtype == torch.bool:
            return chosen, None
        chosen = chosen.float()
        return chosen > torch.finfo(torch.float16).min, chosen
    if hasattr(mask, "mask_mod"):
        return _block_rows(call, rows), None
    got = f"a mask {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
    fix = "Load the model with attn_implementation='sdpa'."
    raise ModelError("attention_row", got, "a mask (B,1,Q,K), (B,K), a BlockMask or none", fix)


def _implied_rows(call: Call, rows: Tensor) -> Tensor:
    """Return visible keys where the kernel itself masks: real tokens, causality, the window (flash attention)."""
    keys, queries = call.key.shape[2], call.query.shape[2]
    at, columns = rows + keys - queries, torch.arange(keys, device=rows.device)
    visible = torch.ones(1, 1, 1, keys, dtype=torch.bool, device=rows.device)
    position, order = at, columns.expand(1, -1)
    if call.mask is not None:  # these kernels drop the pads first, so that distances count real tokens
        real = call.mask[:, :keys].bool()
        order = real.long().cumsum(dim=1) - 1
        position = order.gather(1, at)
        visible = real[:, None, None, :]
    behind = position[:, :, None, None] - order[:, None, None, :]
    window = call.settings.get("sliding_window")
    if is_causal(call):
        visible = visible & (behind >= 0)
    if window is not None:
        visible = visible & (behind < window)
        visible = visible if is_causal(call) else visible & (behind > -window)
    return visible


def _block_rows(call: Call, rows: Tensor) -> Tensor:
    """Return visible keys by flex attention's BlockMask, evaluated at these positions only."""
    device = rows.device
    batch = torch.arange(len(rows), device=device)[:, None, None, None]
    heads = torch.arange(call.query.shape[1], device=device)[None, None, :, None]
    keys = torch.arange(call.key.shape[2], device=device)[None, None, None, :]
    visible: Tensor = call.mask.mask_mod(batch, heads, rows[:, :, None, None], keys)
    return visible.bool()


def output_gap(call: Call, rows: Tensor, weights: Tensor) -> float:
    """Return the difference of weights·values from the layer's own output, relative to the largest rounding error.

    `weights` (B,R,H,K) are `softmax_rows` at `rows` (B,R). Up to 1 is rounding; above, the layer modifies its
    weights in an unsupported way (such as a bias of its own). 0 where the output was not captured or has dropout.
    """
    if call.output is None or call.settings.get("dropout", 0.0):
        return 0.0
    batch, count, heads, keys = weights.shape
    value = call.value.float()
    kv_heads, size = value.shape[1], value.shape[3]
    grouped = weights.transpose(1, 2).reshape(batch, kv_heads, heads // kv_heads * count, keys)
    with torch.autocast(value.device.type, enabled=False):
        mixed = (grouped @ value).reshape(batch, heads, count, size).transpose(1, 2)
    index = rows[:, :, None, None].expand(-1, -1, heads, size)
    off = (mixed - call.output.gather(1, index).float()).abs()
    largest = value.abs().amax(dim=2).repeat_interleave(heads // kv_heads, dim=1)[:, None]  # (B,1,H,Dv)
    coarse = any(x.dtype.itemsize < 4 for x in (call.query, call.key, call.value, call.output))
    allowed = largest.clamp_min(1e-6) * (ROUNDING_16_BIT if coarse else ROUNDING)
    live = weights.sum(dim=-1, keepdim=True) > 0  # kernels disagree on fully masked rows
    if isinstance(call.mask, Tensor) and call.mask.dim() == 2:
        live = live & call.mask.bool().gather(1, rows + keys - call.query.shape[2])[:, :, None, None]
    gap = torch.where(live, off / allowed, 0.0).nan_to_num(0.0)  # a NaN of the model is an error where it is a score
    return float(gap.max()) if gap.numel() else 0.0
