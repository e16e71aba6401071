"""The DPO loss by hand, its gradient, its limits, and what it refuses."""

from __future__ import annotations

import inspect
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from apportion import losses
from apportion.errors import ConfigError, DataError

# log π − log π_ref of chosen: 1, −2, 0; of rejected: −1, 1, 0; so h is 2, −3, 0
CHOSEN, REF_CHOSEN = [-4.0, -9.0, -5.0], [-5.0, -7.0, -5.0]
REJECTED, REF_REJECTED = [-6.0, -2.0, -8.0], [-5.0, -3.0, -8.0]
MARGINS = [2.0, -3.0, 0.0]


def example(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    chosen, rejected, one, two = (torch.tensor(x, dtype=dtype) for x in (CHOSEN, REJECTED, REF_CHOSEN, REF_REJECTED))
    return chosen, rejected, one, two


@pytest.mark.parametrize(
    ("settings", "each"),
    [
        # −log σ(x) = log(1 + e^−x) at x = 1, −1.5, 0
        ({"beta": 0.5}, [0.3132617, 1.7014133, 0.6931472]),
        # β 0.1: x = 0.2, −0.3, 0
        ({}, [0.5981389, 0.8543552, 0.6931472]),
        # ε 0.1 adds 0.1·x: −(1−ε)·log σ(x) − ε·log σ(−x) = −log σ(x) + ε·x
        ({"beta": 0.5, "label_smoothing": 0.1}, [0.4132617, 1.5514133, 0.6931472]),
        # (h − 1)² at β 0.5
        ({"beta": 0.5, "kind": "ipo"}, [1.0, 16.0, 1.0]),
        # .75·(h − 1)² + .25·(h + 1)²: .75 + 2.25 | 12 + 1 | 1
        ({"beta": 0.5, "kind": "ipo", "label_smoothing": 0.25}, [3.0, 13.0, 1.0]),
    ],
)
def test_by_hand(settings: dict[str, Any], each: list[float]) -> None:
    total, count = losses.dpo(*example(), **settings)
    assert total.shape == count.shape == () and float(count) == 3
    assert float(total) == pytest.approx(sum(each), abs=1e-6)
    for i, expected in enumerate(each):  # the sum is over pairs that do not know of each other
        one, _ = losses.dpo(*(x[i : i + 1] for x in example()), **settings)
        assert float(one) == pytest.approx(expected, abs=1e-6)


def slope(kind: str, beta: float, epsilon: float, h: float) -> float:
    """Return the derivative of a pair's loss by h."""
    if kind == "ipo":
        return 2 * (1 - epsilon) * (h - 0.5 / beta) + 2 * epsilon * (h + 0.5 / beta)
    return beta * (epsilon - 1 / (1 + math.exp(beta * h)))


@pytest.mark.parametrize("kind", ["sigmoid", "ipo"])
@pytest.mark.parametrize("epsilon", [0.0, 0.2])
def test_the_gradient_is_the_derivative_by_hand_and_none_reaches_the_reference(kind: str, epsilon: float) -> None:
    given = [x.requires_grad_() for x in example(torch.float64)]
    total, _ = losses.dpo(*given, beta=0.3, kind=kind, label_smoothing=epsilon)
    total.backward()
    expected = [slope(kind, 0.3, epsilon, h) for h in MARGINS]
    chosen, rejected, *reference = given
    assert chosen.grad is not None and chosen.grad.tolist() == pytest.approx(expected, abs=1e-12)
    assert rejected.grad is not None and torch.equal(rejected.grad, -chosen.grad)
    assert [x.grad for x in reference] == [None, None]


@pytest.mark.parametrize("kind", ["sigmoid", "ipo"])
def test_gradcheck(kind: str) -> None:
    chosen, rejected, one, two = example(torch.float64)
    inputs = (chosen.requires_grad_(), rejected.requires_grad_())
    assert torch.autograd.gradcheck(lambda a, b: losses.dpo(a, b, one, two, kind=kind, label_smoothing=0.1)[0], inputs)


@settings(max_examples=30)
@given(st.integers(0, 2**31), st.floats(0.01, 5), st.floats(0, 0.49))
def test_it_is_a_likelihood_of_both_orders(seed: int, beta: float, epsilon: float) -> None:
    """Swapping every pair is the loss with the complement of ε: the two add up to those of a fair coin."""
    x = torch.randn(4, 7, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    ahead, _ = losses.dpo(x[0], x[1], x[2], x[3], beta=beta, label_smoothing=epsilon)
    swapped, count = losses.dpo(x[1], x[0], x[3], x[2], beta=beta, label_smoothing=epsilon)
    h = (x[0] - x[2]) - (x[1] - x[3])
    both = sum(math.log1p(math.exp(-beta * v)) + math.log1p(math.exp(beta * v)) for v in h.tolist())
    assert float(ahead + swapped) == pytest.approx(both, rel=1e-9) and float(count) == 7


def test_far_margins_stay_finite_and_half_precision_is_computed_in_float32() -> None:
    far = torch.tensor([1e4, -1e4], requires_grad=True)
    zero = torch.zeros(2)
    total, _ = losses.dpo(far, zero, zero, zero, beta=1.0)
    total.backward()
    assert float(total.detach()) == pytest.approx(1e4) and far.grad is not None and far.grad.tolist() == [0.0, -1.0]
    assert losses.dpo(*(x.to(torch.bfloat16) for x in example()))[0].dtype == torch.float32


def test_no_pairs_have_no_loss() -> None:
    total, count = losses.dpo(*(torch.zeros(0) for _ in range(4)))
    assert (float(total), float(count)) == (0.0, 0.0)


def test_its_signature_is_the_designs() -> None:
    names = list(inspect.signature(losses.dpo).parameters)
    assert names[:4] == ["policy_chosen", "policy_rejected", "reference_chosen", "reference_rejected"]
    assert names[4:] == ["beta", "kind", "label_smoothing"] and "dpo" not in losses.names()


@pytest.mark.parametrize(
    ("settings", "pieces"),
    [
        ({"kind": "hinge"}, ["dpo.kind", "one of ipo, sigmoid"]),
        ({"beta": 0.0}, ["dpo.beta: got 0.0", "a finite number > 0"]),
        ({"beta": -1}, ["dpo.beta: got -1"]),
        ({"beta": float("nan")}, ["dpo.beta"]),
        ({"label_smoothing": 0.5}, ["dpo.label_smoothing: got 0.5", "less than 0.5"]),
        ({"label_smoothing": 0.6}, ["dpo.label_smoothing: got 0.6", "[0, 0.5]"]),
    ],
)
def test_settings_outside_their_range_are_refused(settings: dict[str, Any], pieces: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        losses.dpo(*example(), **settings)
    assert all(piece in str(caught.value) for piece in pieces)


def test_shapes_that_differ_are_refused() -> None:
    chosen, rejected, one, two = example()
    for wrong in ((chosen, rejected[:2], one, two), tuple(x[:, None] for x in (chosen, rejected, one, two))):
        with pytest.raises(DataError, match="four tensors"):
            losses.dpo(*wrong)
