"""Products by oneDNN beside torch's own linear layer: values, gradients, shapes, and where each is taken."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from apportion.models.fast.linear import FlatLinear, LowRank
from apportion.models.fast.onednn import (
    LEAST_ELEMENTS,
    can_pack_to_sample,
    has_fast_product,
    linear,
    onednn_product,
    pack,
    product,
)

OUT, IN = 320, 256  # more than LEAST_ELEMENTS
pytestmark = pytest.mark.skipif(
    not has_fast_product(torch.zeros(1, IN), torch.zeros(OUT, IN)), reason="no float32 products by oneDNN here"
)


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("rows", [1, 16, 301])
@pytest.mark.parametrize("biased", [False, True])
def test_values_and_gradients_are_those_of_float64(rows: int, biased: bool) -> None:
    x, weight, bias = numbers(rows, IN), numbers(OUT, IN, seed=1), numbers(OUT, seed=2) if biased else None
    leaves = [t.requires_grad_() for t in (x, weight, bias) if t is not None]
    out = linear(x, weight, bias)
    assert out.grad_fn is not None and type(out.grad_fn).__name__ == "PlainLinearBackward"
    upstream = numbers(rows, OUT, seed=3)
    got = torch.autograd.grad(out, leaves, upstream)
    wide = [t.detach().double().requires_grad_() for t in leaves]
    expected = functional.linear(*wide)
    wanted = torch.autograd.grad(expected, wide, upstream.double())
    for mine, right in zip((out, *got), (expected, *wanted), strict=True):
        torch.testing.assert_close(mine.double(), right, rtol=1e-5, atol=1e-4)


def test_a_frozen_weight_saves_no_input_and_gets_no_gradient() -> None:
    x, weight = numbers(8, IN).requires_grad_(), numbers(OUT, IN, seed=1)
    out = linear(x, weight, None)
    assert out.grad_fn.saved_tensors[0] is None  # type: ignore[union-attr]
    out.sum().backward()
    assert weight.grad is None
    torch.testing.assert_close(x.grad, weight.sum(dim=0).expand(8, IN), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("view", ["columns", "transposed", "every other row"])
def test_inputs_and_weights_of_any_strides(view: str) -> None:
    x = {
        "columns": numbers(24, 2 * IN)[:, IN:],
        "transposed": numbers(IN, 24).T,
        "every other row": numbers(48, IN)[::2],
    }[view]
    weight = numbers(IN, OUT, seed=1).T
    torch.testing.assert_close(linear(x, weight, None), x @ weight.T, rtol=1e-5, atol=1e-4)
    back = numbers(24, 2 * OUT, seed=2)[:, ::2]
    torch.testing.assert_close(product(back, weight), back @ weight, rtol=1e-5, atol=1e-4)


def test_packed_weights_give_the_same_product() -> None:
    x, weight, bias = numbers(16, IN), numbers(OUT, IN, seed=1), numbers(OUT, seed=2)
    assert can_pack_to_sample(weight)
    torch.testing.assert_close(onednn_product(x, pack(weight), bias), linear(x, weight, bias), rtol=1e-5, atol=1e-4)


def test_an_adapted_layer_has_the_gradients_of_its_formula() -> None:
    x, weight = numbers(12, IN).requires_grad_(), numbers(OUT, IN, seed=1)
    down, up = (numbers(4, IN, seed=2) / 16).requires_grad_(), (numbers(OUT, 4, seed=3) / 2).requires_grad_()
    out = LowRank.apply(x, weight, None, down, up, 0.5)
    expected = x @ weight.T + 0.5 * (x @ down.T) @ up.T
    upstream = numbers(12, OUT, seed=4)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-3)
    for mine, right in zip(
        torch.autograd.grad(out, (x, down, up), upstream),
        torch.autograd.grad(expected, (x, down, up), upstream),
        strict=True,
    ):
        torch.testing.assert_close(mine, right, rtol=1e-4, atol=2e-3)


def test_torch_multiplies_what_is_small_or_of_another_type() -> None:
    large, x = numbers(OUT, IN), numbers(4, IN)
    assert has_fast_product(x, large)
    small = numbers(LEAST_ELEMENTS // IN - 1, IN)
    assert not has_fast_product(x, small)
    assert torch.equal(linear(x, small, None), functional.linear(x, small))
    assert not has_fast_product(x.double(), large.double()) and not has_fast_product(x.bfloat16(), large)
    assert linear(x[:0], large, None).shape == (0, OUT)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert linear(x, large, None).dtype == torch.bfloat16


def test_a_layer_multiplies_an_input_of_three_dimensions() -> None:
    layer = torch.nn.Linear(IN, OUT)
    x = numbers(2, 5, IN)
    expected = layer(x)
    layer.__class__ = FlatLinear
    out = layer(x)
    assert out.shape == (2, 5, OUT) and type(out.grad_fn.next_functions[0][0]).__name__ == "PlainLinearBackward"
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
