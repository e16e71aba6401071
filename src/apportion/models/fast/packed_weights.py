"""Frozen 16-bit weights in the order that a processor's products read, for as long as they are trained over.

oneDNN orders a weight anew in every product otherwise: with 500 rows of a 135M model that is a seventh of a training
step. Both orders, for outputs and for input gradients, take the weights' memory twice more, so this is for models whose
weights stay frozen and whose activations leave room.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Packs(NamedTuple):
    """A weight (n,k) as oneDNN orders it, for x·Wᵀ and for g·W."""

    forward: Tensor
    backward: Tensor

    def times(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Return x·Wᵀ + bias (m,n) of x (m,k)."""
        return packed_product(x, self.forward, bias)

    def times_transposed(self, gradient: Tensor) -> Tensor:
        """Return g·W (m,k) of a gradient (m,n)."""
        return packed_product(gradient.contiguous(), self.backward, None)


class Frozen(torch.autograd.Function):
    """x·Wᵀ + b of a packed weight that does not learn; nothing is kept for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, packs: Packs, bias: Tensor | None) -> Tensor:
        """Return (m,n) for x (m,k)."""
        ctx.packs = packs
        return packs.times(x, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        """Return the gradient of x."""
        return ctx.packs.times_transposed(gradients[0]), None, None


@contextmanager
def packed(model: nn.Module) -> Iterator[None]:
    """Have the frozen linear layers of `model` multiply packed weights inside; their weights must not change there."""
    from apportion.models.fast.linear import FlatLinear

    found = [m for m in model.modules() if type(m) is FlatLinear and _stays(m)]
    for layer in found:
        weight = layer.weight.detach()
        layer.packs = Packs(pack(weight), pack(weight.T.contiguous()))
    try:
        yield
    finally:
        for layer in found:
            layer.packs = None


def _stays(layer: nn.Linear) -> bool:
    learns = layer.weight.requires_grad or (layer.bias is not None and layer.bias.requires_grad)
    return not learns and can_pack(layer.weight)


def pack(weight: Tensor) -> Tensor:
    """Return `weight` (n,k) in oneDNN's order, where `can_pack` says so."""
    return torch.ops.mkldnn._reorder_linear_weight(weight)  # type: ignore[no-any-return]


def packed_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return x·Wᵀ + bias (m,n) of x (m,k) and a packed weight."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")  # type: ignore[no-any-return]


def can_pack(weight: Tensor) -> bool:
    """Whether oneDNN holds `weight` in an order of its own, in which products with few rows are 15 to 45% faster."""
    here = weight.device.type == "cpu" and weight.dtype == torch.bfloat16 and torch.backends.mkldnn.is_available()
    return here and hasattr(torch.ops.mkldnn, "_reorder_linear_weight") and torch.ops.mkldnn._is_mkldnn_bf16_supported()
