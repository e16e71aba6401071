"""Linear layers without detours: two-dimensional products, and adapters that compute in the layer's own dtype.

`torch.matmul` multiplies a strided three-dimensional input with a frozen weight as a batch of products over *copies*
of the weight, which costs more than the product; and peft's adapters cast their input to float32 and back. The classes
here replace a layer's `forward` and nothing else: parameters, names, merging and saving stay the layer's own.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from apportion.models.fast.packed_weights import Frozen, Packs


def quicken(model: nn.Module) -> None:
    """Give every plain linear layer of `model`, and every LoRA layer on one, the `forward` of this file."""
    from peft.tuners.lora.layer import Linear as PeftLinear

    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = FlatLinear
        elif type(module) is PeftLinear and isinstance(module.base_layer, nn.Linear):
            module.__class__ = quick_lora()


class FlatLinear(nn.Linear):
    """`nn.Linear` that multiplies (n,d) whatever the input's shape and strides, packed weights where it has them."""

    packs: Packs | None = None

    def forward(self, input: Tensor) -> Tensor:
        """Return input · weightᵀ + bias."""
        flat = input.reshape(-1, input.shape[-1])
        if self.packs is not None and flat.dtype == self.weight.dtype:
            flat = Frozen.apply(flat, self.packs, self.bias)  # type: ignore[no-untyped-call]
        else:
            flat = nn.functional.linear(flat, self.weight, self.bias)
        return flat.view(*input.shape[:-1], flat.shape[-1])


_QUICK_LORA: list[type] = []


def quick_lora() -> type:
    """Return the class of peft's LoRA layer with a `forward` of ours; made once, as peft is imported only when used."""
    from peft.tuners.lora.layer import Linear as PeftLinear

    if not _QUICK_LORA:

        class QuickLora(PeftLinear):  # type: ignore[misc]
            """peft's LoRA layer; one plain adapter is computed as base product plus two thin ones, in place."""

            def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
                name = active_adapter(self)
                if self.disable_adapters and not self.merged:
                    return self.base_layer(x)
                if name is None or args or kwargs:
                    return super().forward(x, *args, **kwargs)
                base, down, up = self.base_layer, self.lora_A[name].weight, self.lora_B[name].weight
                flat = x.reshape(-1, x.shape[-1])
                packs = getattr(base, "packs", None) if flat.dtype == base.weight.dtype else None
                out = LowRank.apply(flat, base.weight, base.bias, down, up, self.scaling[name], packs)
                return out.view(*x.shape[:-1], out.shape[-1])

        _QUICK_LORA.append(QuickLora)
    return _QUICK_LORA[0]


def active_adapter(layer: Any) -> str | None:
    """Return the name of the one adapter of peft's `layer`, if that is W + s·BA and nothing else, else None.

    That is: not merged, no dropout, no bias, no variant (DoRA, …), and a frozen base.
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


class Parts(NamedTuple):
    """What a linear layer computes: x·weightᵀ + bias, and x·downᵀ·upᵀ beside it where it is adapted."""

    weight: Tensor
    bias: Tensor | None
    down: Tensor | None = None
    up: Tensor | None = None


def parts_of(layer: Any) -> Parts | None:
    """Return the parts of a plain linear layer, adapted as in `quick_lora` or not; None for any other layer."""
    if type(layer) in (nn.Linear, FlatLinear):
        return Parts(layer.weight, layer.bias)
    if not _QUICK_LORA or type(layer) is not _QUICK_LORA[0]:
        return None
    adapted: Any = layer
    name = active_adapter(adapted)
    if adapted.disable_adapters and not adapted.merged:
        return parts_of(adapted.base_layer)
    if name is None:
        return None
    up = adapted.lora_B[name].weight * adapted.scaling[name]
    return Parts(adapted.base_layer.weight, adapted.base_layer.bias, adapted.lora_A[name].weight, up)


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
        packs: Packs | None = None,
    ) -> Tensor:
        """Return (m,n) for x (m,k), in x's dtype; `packs` are of the weight."""
        narrow_down, narrow_up = down.to(x.dtype), (up * s).to(x.dtype)
        inner = x @ narrow_down.T  # (m,r)
        base = nn.functional.linear(x, weight, bias) if packs is None else packs.times(x, bias)
        out = base.addmm_(inner, narrow_up.T)
        ctx.save_for_backward(x, weight, narrow_down, narrow_up, inner)
        ctx.scale, ctx.dtypes, ctx.packs = s, (down.dtype, up.dtype), packs
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of x, A and B."""
        x, weight, down, up, inner = ctx.saved_tensors
        gradient = gradients[0]
        thin = gradient @ up  # (m,r), the scale is in it
        d_x = None
        if ctx.needs_input_grad[0]:
            through = gradient @ weight if ctx.packs is None else ctx.packs.times_transposed(gradient)
            d_x = through.addmm_(thin, down)
        d_down = (thin.T @ x).to(ctx.dtypes[0])
        d_up = (gradient.T @ inner).to(ctx.dtypes[1]).mul_(ctx.scale)
        return d_x, None, None, d_down, d_up, None, None
