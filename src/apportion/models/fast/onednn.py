"""Linear products by oneDNN: over packed weights where they are frozen, over plain ones in float32.

Packing puts a weight into oneDNN's memory layout once instead of in every product, where it takes a seventh of a
training step of a 135M model with 500 rows in 16 bit. Both layouts, for outputs and for input gradients, take twice
the weights' memory in addition, so training packs only frozen 16-bit weights; sampling packs one layout.

Float32 products go to another library by default, which on some processors reaches half of oneDNN's rate with the few
rows of a sampling step and 80% of it with 500 rows (docs/speed.md). oneDNN takes a plain weight as it is stored.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

LEAST_ELEMENTS = 1 << 16  # of a float32 weight: smaller products cost little in either library


class PackedWeight(NamedTuple):
    """A weight (n,k) in oneDNN's layout, for x·Wᵀ and for g·W."""

    forward: Tensor
    backward: Tensor

    def times(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Return x·Wᵀ + bias (m,n) of x (m,k)."""
        return onednn_product(x, self.forward, bias)

    def times_transposed(self, gradient: Tensor) -> Tensor:
        """Return g·W (m,k) of a gradient (m,n)."""
        return onednn_product(gradient, self.backward, None)


class PackedLinear(torch.autograd.Function):
    """x·Wᵀ + b with a frozen packed weight; saves no tensor for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: PackedWeight, bias: Tensor | None) -> Tensor:
        """Return (m,n) for x (m,k)."""
        ctx.packed = packed
        return packed.times(x, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        """Return the gradient of x."""
        return ctx.packed.times_transposed(gradients[0]), None, None


class PlainLinear(torch.autograd.Function):
    """x·Wᵀ + b with a float32 weight as it is stored, and its gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return (m,n) for x (m,k)."""
        trains = weight.requires_grad
        ctx.save_for_backward(x if trains else None, weight)
        return onednn_product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of x, weight and bias."""
        x, weight = ctx.saved_tensors
        gradient = gradients[0]
        to_x, to_weight, to_bias = ctx.needs_input_grad
        d_x = onednn_product(gradient, weight.T, None) if to_x else None
        return d_x, gradient.T @ x if to_weight else None, gradient.sum(dim=0) if to_bias else None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return x·weightᵀ + bias (m,n) of x (m,k) and a weight (n,k) as it is stored, by the faster library."""
    if not has_fast_product(x, weight):
        return torch.nn.functional.linear(x, weight, bias)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias)):
        return PlainLinear.apply(x, weight, bias)  # type: ignore[no-untyped-call, no-any-return]
    return onednn_product(x, weight, bias)


def product(x: Tensor, weight: Tensor) -> Tensor:
    """Return x·weight (m,k) of x (m,n) and a weight (n,k), without a graph, by the faster library."""
    return onednn_product(x, weight.T, None) if has_fast_product(x, weight) else x @ weight


def onednn_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return x·Wᵀ + bias (m,n) of x (m,k) and a weight (n,k), packed or not, without a graph."""
    return torch.ops.mkldnn._linear_pointwise(x.contiguous(), weight, bias, "none", [], "")  # type: ignore[no-any-return]


def has_fast_product(x: Tensor, weight: Tensor) -> bool:
    """Whether `linear` multiplies x (m,k) and `weight` by oneDNN: plain float32 tensors of a size, outside autocast."""
    plain = type(weight) in (Tensor, torch.nn.Parameter) and type(x) is Tensor and len(x) > 0
    same = x.dtype == weight.dtype == torch.float32 and weight.device.type == "cpu"
    return plain and same and weight.numel() >= LEAST_ELEMENTS and _HAS_FLOAT32 and not torch.is_autocast_enabled("cpu")


def pack(weight: Tensor) -> Tensor:
    """Return `weight` (n,k) in oneDNN's layout; only where `can_pack`."""
    return torch.ops.mkldnn._reorder_linear_weight(weight)  # type: ignore[no-any-return]


def can_pack(weight: Tensor) -> bool:
    """Whether oneDNN has a layout for `weight`, with which products of few rows are 15 to 45% faster."""
    supported = weight.device.type == "cpu" and weight.dtype == torch.bfloat16 and _HAS_LAYOUTS
    return supported and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def can_pack_to_sample(weight: Tensor) -> bool:
    """Whether a packed `weight` makes sampling faster: as `can_pack`; float32 products of 16 rows gain 2.5-fold."""
    return can_pack(weight) or has_fast_product(weight, weight)


_HAS_LAYOUTS = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
_HAS_FLOAT32 = _HAS_LAYOUTS and torch.backends.cpu.get_cpu_capability().startswith("AVX")
