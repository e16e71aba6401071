"""Faster linear layers: two-dimensional products by the faster library, adapters in the layer's own dtype.

`torch.matmul` multiplies a strided three-dimensional input with a frozen weight as a batch of products over *copies*
of the weight, which costs more than the product; and peft's adapters cast their input to float32 and back. The classes
here override only a layer's `forward`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from apportion.models.fast.onednn import PackedLinear, PackedWeight, can_pack, linear, pack, product


def use_fast_linear(model: nn.Module) -> None:
    """Replace the `forward` of every plain linear layer of `model`, and of every LoRA layer on one."""
    from peft.tuners.lora.layer import Linear as PeftLinear

    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = FlatLinear
        elif type(module) is PeftLinear and isinstance(module.base_layer, nn.Linear):
            module.__class__ = fast_lora()


class FlatLinear(nn.Linear):
    """`nn.Linear` as one two-dimensional product for any shape and strides, over a packed weight where there is one."""

    packed: PackedWeight | None = None

    def forward(self, input: Tensor) -> Tensor:
        """Return input · weightᵀ + bias."""
        flat = input.reshape(-1, input.shape[-1])
        if self.packed is not None and flat.dtype == self.weight.dtype:
            flat = PackedLinear.apply(flat, self.packed, self.bias)  # type: ignore[no-untyped-call]
        else:
            flat = linear(flat, self.weight, self.bias)
        return flat.view(*input.shape[:-1], flat.shape[-1])


_FAST_LORA: list[type] = []


def fast_lora() -> type:
    """Return the subclass of peft's LoRA layer with a faster `forward`; made once, as peft is imported lazily."""
    from peft.tuners.lora.layer import Linear as PeftLinear

    if not _FAST_LORA:

        class FastLora(PeftLinear):
            """peft's LoRA layer; one plain adapter is computed as the base product plus two low-rank ones, in place."""

            def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
                name = active_adapter(self)
                if self.disable_adapters and not self.merged:
                    plain: Tensor = self.base_layer(x)
                    return plain
                if name is None or args or kwargs:
                    return super().forward(x, *args, **kwargs)
                base, down, up = self.base_layer, self.lora_A[name].weight, self.lora_B[name].weight
                flat = x.reshape(-1, x.shape[-1])
                packed = getattr(base, "packed", None) if flat.dtype == base.weight.dtype else None
                out: Tensor = LowRank.apply(  # type: ignore[no-untyped-call]
                    flat, base.weight, base.bias, down, up, self.scaling[name], packed
                )
                return out.view(*x.shape[:-1], out.shape[-1])

        _FAST_LORA.append(FastLora)
    return _FAST_LORA[0]


def active_adapter(layer: Any) -> str | None:
    """Return the name of the only adapter of peft's `layer` if the layer is plain W + s·BA, else None.

    Plain is: not merged, no dropout, no bias, no variant (DoRA, …), and a frozen base.
    """
    names = layer.active_adapters
    name = str(names[0]) if len(names) == 1 else ""
    plain = (
        name in layer.lora_A
        and not layer.merged
        and isinstance(layer.lora_dropout[name], nn.Identity)
        and not layer.lora_bias[name]
        and name not in getattr(layer, "lora_variant", {})
        and not layer.base_layer.weight.requires_grad
    )
    return name if plain else None


class LinearParts(NamedTuple):
    """The parts of x·weightᵀ + bias, plus x·downᵀ·upᵀ where the layer is adapted."""

    weight: Tensor
    bias: Tensor | None
    down: Tensor | None = None
    up: Tensor | None = None


def linear_parts(layer: Any) -> LinearParts | None:
    """Return the parts of a plain linear layer, with or without a plain adapter; None for any other layer."""
    if type(layer) in (nn.Linear, FlatLinear):
        return LinearParts(layer.weight, layer.bias)
    if not _FAST_LORA or type(layer) is not _FAST_LORA[0]:
        return None
    adapted: Any = layer
    name = active_adapter(adapted)
    if adapted.disable_adapters and not adapted.merged:
        return linear_parts(adapted.base_layer)
    if name is None:
        return None
    up = adapted.lora_B[name].weight * adapted.scaling[name]
    return LinearParts(adapted.base_layer.weight, adapted.base_layer.bias, adapted.lora_A[name].weight, up)


class LowRank(torch.autograd.Function):
    """x·Wᵀ + b + s·(x·Aᵀ)·Bᵀ with a frozen W (n,k), A (r,k) and B (n,r), which may be float32 over a 16-bit W."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        down: Tensor,
        up: Tensor,
        s: float,
        packed: PackedWeight | None = None,
    ) -> Tensor:
        """Return (m,n) for x (m,k), in x's dtype; `packed` is the packed weight."""
        narrow_down, narrow_up = down.to(x.dtype), (up * s).to(x.dtype)
        inner = x @ narrow_down.T  # (m,r)
        base = linear(x, weight, bias) if packed is None else packed.times(x, bias)
        out = base.addmm_(inner, narrow_up.T)
        ctx.save_for_backward(x, weight, narrow_down, narrow_up, inner)
        ctx.scale, ctx.dtypes, ctx.packed = s, (down.dtype, up.dtype), packed
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of x, A and B."""
        x, weight, down, up, inner = ctx.saved_tensors
        gradient = gradients[0]
        inner_gradient = gradient @ up  # (m,r), scaled
        d_x = None
        if ctx.needs_input_grad[0]:
            through = product(gradient, weight) if ctx.packed is None else ctx.packed.times_transposed(gradient)
            d_x = through.addmm_(inner_gradient, down)
        d_down = (inner_gradient.T @ x).to(ctx.dtypes[0])
        d_up = (gradient.T @ inner).to(ctx.dtypes[1]).mul_(ctx.scale)
        return d_x, None, None, d_down, d_up, None, None


@contextmanager
def use_packed_weights(model: nn.Module) -> Iterator[None]:
    """Pack the frozen linear layers of `model` within the `with` block; their weights must not change in it."""
    layers = [m for m in model.modules() if type(m) is FlatLinear and _is_frozen(m) and can_pack(m.weight)]
    for layer in layers:
        weight = layer.weight.detach()
        layer.packed = PackedWeight(pack(weight), pack(weight.T.contiguous()))
    try:
        yield
    finally:
        for layer in layers:
            layer.packed = None


def _is_frozen(layer: nn.Linear) -> bool:
    return not any(parameter.requires_grad for parameter in layer.parameters(recurse=False))
