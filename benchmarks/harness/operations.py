"""Operation counts of kernels that PyTorch's FlopCounterMode lacks: CPU attention, in-place products, oneDNN's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch

aten = torch.ops.aten


def product(_: Any, left: Sequence[int], right: Sequence[int], *args: Any, **kwargs: Any) -> int:
    """Return 2·(b·)m·k·n of `out + left @ right` from shapes (…,m,k) and (…,k,n)."""
    return 2 * prod(left) * right[-1]


def linear(x: Sequence[int], weight: Sequence[int], *args: Any, **kwargs: Any) -> int:
    """Return 2·m·k·n of x·Wᵀ from shapes (…,k) and (n,k); a packed weight keeps its shape."""
    return 2 * prod(x) * weight[0]


def attention(query: Sequence[int], key: Sequence[int], value: Sequence[int], *args: Any, **kwargs: Any) -> int:
    """Return the operations of softmax(QKᵀ)V from shapes (B,H,T,d), every pair counted, causal or not.

    As PyTorch's own formula counts them; keys and values may have fewer heads than the queries.
    """
    pairs = prod(query[:-1]) * key[-2]
    return 2 * pairs * (query[-1] + value[-1])


def attention_backward(
    _: Any, query: Sequence[int], key: Sequence[int], value: Sequence[int], *args: Any, **kwargs: Any
) -> int:
    """Return the operations of attention's gradient: the scores once more, then dV, dP, dQ and dK: five products."""
    pairs = prod(query[:-1]) * key[-2]
    return 2 * pairs * (3 * query[-1] + 2 * value[-1])


FORMULAS: dict[Any, Callable[..., int]] = {
    aten.addmm_: product,
    aten.baddbmm_: product,
    aten._scaled_dot_product_flash_attention_for_cpu: attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward,
}
if hasattr(torch.ops.mkldnn, "_linear_pointwise"):  # not in every build of PyTorch
    FORMULAS[torch.ops.mkldnn._linear_pointwise] = linear
