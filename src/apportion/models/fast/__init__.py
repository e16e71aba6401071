"""Faster kernels with equal results, all behind one switch: linear layers, adapters, norms and gated units.

`use_fast_kernels` replaces the `forward` of modules in place; parameters, names, merging and saving are unaffected.
Everything else that is faster for such a model (adapters added later, packed weights, the Llama decoding step) asks
`has_fast_kernels`, so that a model which was loaded with `fast_kernels: false` runs its own code throughout.
"""

from __future__ import annotations

from torch import nn

from apportion.models.fast.linear import FlatLinear, use_fast_linear, use_packed_weights
from apportion.models.fast.norms import use_fast_norms

__all__ = ["has_fast_kernels", "use_fast_kernels", "use_fast_linear", "use_packed_weights"]


def use_fast_kernels(model: nn.Module) -> None:
    """Replace the `forward` of every module of `model` that has a faster equivalent here."""
    use_fast_linear(model)
    use_fast_norms(model)


def has_fast_kernels(model: nn.Module) -> bool:
    """Whether `use_fast_kernels` was applied to `model`."""
    return any(type(module) is FlatLinear for module in model.modules())
