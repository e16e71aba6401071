"""RMS norms and gated units that save only their inputs for the backward pass.

With autograd's own operations a norm saves two float32 copies of its input, and a gated unit three tensors as wide as
the layer; together that is more than half of a layer's saved tensors. The forward results are bitwise equal.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def use_fast_norms(model: nn.Module) -> None:
    """Replace the `forward` of the RMS norms and gated SiLU units of `model`.

    Each module is first evaluated on random numbers, and left unchanged where the result is not bitwise equal.
    """
    for module in model.modules():
        kind = type(module)
        if kind.__name__.endswith("RMSNorm") and hasattr(module, "variance_epsilon"):
            _replace(module, FAST.setdefault(kind, type(f"Fast{kind.__name__}", (_FastNorm, kind), {})))
        elif all(hasattr(module, name) for name in GATED) and type(module.act_fn).__name__ in SILU:
            _replace(module, FAST.setdefault(kind, type(f"Fast{kind.__name__}", (_FastGate, kind), {})))


GATED, SILU = ("gate_proj", "up_proj", "down_proj", "act_fn"), ("SiLU", "SiLUActivation")
FAST: dict[type, type] = {}  # a library's class -> its subclass here


@torch.no_grad()
def _replace(module: Any, kind: type) -> None:
    """Make `module` an instance of `kind` if its result stays bitwise equal."""
    weight = next(module.parameters())
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, weight.shape[-1], generator=generator).to(weight)
    original = type(module)
    try:
        expected = module(x)
    except Exception:  # a module of the same attributes that takes other inputs
        return
    module.__class__ = kind
    if not torch.equal(module(x), expected):
        module.__class__ = original


class _FastNorm(nn.Module):
    weight: nn.Parameter
    variance_epsilon: float

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Return x·weight/√(mean x² + ε), computed in float32 and rounded before the weight."""
        if hidden_states.dtype != self.weight.dtype:  # the library promotes to another dtype
            return super().forward(hidden_states)  # type: ignore[no-any-return]
        if not torch.is_grad_enabled():
            return normed(hidden_states, self.variance_epsilon)[0].mul_(self.weight)
        return RMSNorm.apply(hidden_states, self.weight, self.variance_epsilon)  # type: ignore[no-untyped-call, no-any-return]


class _FastGate(nn.Module):
    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        """Return down(silu(gate(x))·up(x))."""
        inner: Tensor = Gate.apply(self.gate_proj(x), self.up_proj(x))  # type: ignore[no-untyped-call]
        return self.down_proj(inner)  # type: ignore[no-any-return]


def normed(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return (x/√(mean x² + ε) in x's dtype, the factor (…,1) in float32)."""
    wide = x.float()
    factor = wide.pow(2).mean(-1, keepdim=True).add_(eps).rsqrt_()
    return (wide * factor if wide is x else wide.mul_(factor)).to(x.dtype), factor


class RMSNorm(torch.autograd.Function):
    """Zhang & Sennrich 2019 (arXiv 1910.07467), eq. 4. Saves x and one number a row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Return the normed x (…,d)."""
        out, factor = normed(x, eps)
        ctx.save_for_backward(x, weight, factor)
        return out.mul_(weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of x and of the weight.

        With n = x·f: dx = f·(g − n·mean(g·n)), where g is the gradient times the weight.
        """
        x, weight, factor = ctx.saved_tensors
        norm = x.float().mul_(factor) if x.dtype != torch.float32 else x * factor
        wide = gradients[0].float()
        product = wide * norm
        d_weight = product.flatten(0, -2).sum(dim=0).to(weight.dtype) if ctx.needs_input_grad[1] else None
        if not ctx.needs_input_grad[0]:
            return None, d_weight, None
        wide_weight = weight.float()
        inner = (product @ wide_weight)[..., None].div_(x.shape[-1])  # mean of g·n, as product·weight = g·n
        d_x = torch.addcmul(wide * wide_weight, norm, inner, value=-1).mul_(factor)
        return d_x.to(x.dtype), d_weight, None


class Gate(torch.autograd.Function):
    """silu(gate)·up; saves the two inputs and recomputes the rest."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        """Return silu(gate)·up."""
        ctx.save_for_backward(gate, up)
        return nn.functional.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gradients of gate and up."""
        gate, up = ctx.saved_tensors
        gradient = gradients[0]
        d_up = nn.functional.silu(gate).mul_(gradient)
        return torch.ops.aten.silu_backward(gradient * up, gate), d_up
