"""Weights carried over by characters: hand-made tables, a reference that goes character by character, and refusals."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from apportion.errors import DataError
from apportion.models.text.transfer import transfer


def one(weights: list[float], source: list[tuple[int, int]], target: list[tuple[int, int]]) -> list[float]:
    """Return what one row of tokens gets."""
    spans = (torch.tensor(s, dtype=torch.int64).reshape(1, -1, 2) for s in (source, target))
    return transfer(torch.tensor([weights]), *spans)[0].tolist()


@pytest.mark.parametrize(("weights", "source", "target", "expected"), [
    # one long token over two short ones, and back
    ([1.0], [(0, 4)], [(0, 1), (1, 4)], [0.25, 0.75]),
    ([0.5, 0.5], [(0, 1), (1, 4)], [(0, 4)], [1.0]),
    # boundaries that cross: 3 of 4 characters, then 1 of 4 and all of the second
    ([0.8, 0.2], [(0, 4), (4, 6)], [(0, 3), (3, 6)], [0.6, 0.4]),
    # a special token in front (0, 0) and an EOS at the end: neither gives nor gets
    ([9.0, 1.0, 9.0], [(0, 0), (0, 2), (0, 0)], [(0, 2), (2, 2)], [1.0, 0.0]),
    # a prompt of 3 characters: a token across its end leaves half of its weight there
    ([0.4, 0.6], [(0, 3), (2, 4)], [(3, 4)], [0.3]),
    # three byte tokens that make up one emoji share it, the word after it does not
    ([0.9, 0.1], [(0, 1), (1, 3)], [(0, 1), (0, 1), (0, 1), (1, 3)], [0.3, 0.3, 0.3, 0.1]),
    # a token ends in half an emoji: "a" alone, and half of the emoji's 0.6
    ([0.2, 0.6, 0.2], [(0, 1), (1, 2), (2, 3)], [(0, 2), (1, 3)], [0.5, 0.5]),
    # the reward model's byte tokens: both stand on the emoji
    ([0.25, 0.75], [(0, 1), (0, 1)], [(0, 1)], [1.0]),
    # signed
    ([-2.0, 1.0], [(0, 2), (2, 4)], [(0, 1), (1, 4)], [-1.0, 0.0]),
    # characters without a source token, and no characters at all
    ([1.0], [(0, 1)], [(0, 1), (1, 5)], [1.0, 0.0]),
    ([1.0], [(0, 0)], [(0, 0)], [0.0]),
])  # fmt: skip
def test_by_hand(
    weights: list[float], source: list[tuple[int, int]], target: list[tuple[int, int]], expected: list[float]
) -> None:
    assert one(weights, source, target) == pytest.approx(expected, abs=1e-7)


def reference(weights: Tensor, source: Tensor, target: Tensor) -> Tensor:
    """Return the same, one character after the other."""
    out = torch.zeros(target.shape[:2], dtype=torch.float64)
    for row in range(len(weights)):
        for (first, end), weight in zip(source[row].tolist(), weights[row].tolist(), strict=True):
            for character in range(first, end):
                takers = [t for t, (a, b) in enumerate(target[row].tolist()) if a <= character < b]
                for taker in takers:
                    out[row, taker] += weight / (end - first) / len(takers)
    return out


@st.composite
def spans(draw: st.DrawFn, rows: int, tokens: int) -> Tensor:
    pairs = st.lists(st.integers(0, 12), min_size=2, max_size=2).map(sorted)
    drawn = draw(st.lists(pairs, min_size=rows * tokens, max_size=rows * tokens))
    return torch.tensor(drawn, dtype=torch.int64).reshape(rows, tokens, 2)


@st.composite
def covering(draw: st.DrawFn, length: int) -> list[tuple[int, int]]:
    """Spans in order that cover 0 to `length`, some empty."""
    cuts = sorted(draw(st.lists(st.integers(0, length), max_size=6)))
    return list(zip([0, *cuts], [*cuts, length], strict=True))


NUMBERS = st.floats(-100, 100, width=32)


@given(st.data())
def test_equals_the_reference_a_character_at_a_time(data: st.DataObject) -> None:
    rows, k, t = (data.draw(st.integers(low, 4)) for low in (1, 0, 0))
    source, target = data.draw(spans(rows, k)), data.draw(spans(rows, t))
    drawn = data.draw(st.lists(NUMBERS, min_size=rows * k, max_size=rows * k))
    weights = torch.tensor(drawn, dtype=torch.float32).reshape(rows, k)
    before = weights.clone()
    found = transfer(weights, source, target)
    assert found.shape == (rows, t) and found.dtype == torch.float32 and torch.equal(weights, before)
    torch.testing.assert_close(found.double(), reference(weights, source, target), rtol=1e-6, atol=1e-5)
    for row in range(rows):  # a row does not know of its neighbours, nor of padding
        padded = torch.cat([target[row : row + 1], torch.zeros(1, 2, 2, dtype=torch.int64)], dim=1)
        alone = transfer(weights[row : row + 1], source[row : row + 1], padded)[0]
        torch.testing.assert_close(alone[:t], found[row], rtol=0, atol=0)
        assert (alone[t:] == 0).all()
    positive = transfer(weights.abs(), source, target)
    assert (positive >= 0).all()


@given(st.data(), st.integers(1, 4000))
def test_the_mass_is_kept_where_the_target_covers_the_text(data: st.DataObject, length: int) -> None:
    source, target = data.draw(covering(length)), data.draw(covering(length))
    weights = [abs(data.draw(NUMBERS)) for _ in source]
    kept = math.fsum(torch.tensor(w).item() for w, (a, b) in zip(weights, source, strict=True) if b > a)
    found = one(weights, source, target)
    assert math.fsum(found) == pytest.approx(kept, rel=1e-6) and min(found) >= 0
    assert all(value == 0 for value, (a, b) in zip(found, target, strict=True) if a == b)


@given(st.data())
def test_the_same_tokens_keep_their_weights(data: st.DataObject) -> None:
    same = [span for span in data.draw(covering(9)) if span[0] < span[1]]
    weights = torch.tensor([data.draw(NUMBERS) for _ in same])
    assert torch.equal(torch.tensor(one(weights.tolist(), same, same)), weights)


def test_what_stands_on_no_character_cannot_leak() -> None:
    found = one([math.nan, 1.0, math.inf], [(0, 0), (0, 3), (2, 2)], [(0, 1), (1, 3), (3, 3)])
    assert found == pytest.approx([1 / 3, 2 / 3, 0.0])
    empty = torch.zeros(2, 0, 2, dtype=torch.int64)
    assert transfer(torch.zeros(2, 0), empty, empty).shape == (2, 0)
    half = transfer(torch.ones(1, 1, dtype=torch.bfloat16), torch.tensor([[[0, 2]]]), torch.tensor([[[0, 1], [1, 2]]]))
    assert half.dtype == torch.bfloat16 and half.tolist() == [[0.5, 0.5]]


@pytest.mark.parametrize(("weights", "source", "target", "message"), [
    (torch.ones(3), [[[0, 1]]], [[[0, 1]]], r"weights: got 'torch.float32 \(3,\)'; expected a float tensor \(B,K\)"),
    (torch.ones(1, 1, dtype=torch.int64), [[[0, 1]]], [[[0, 1]]], "weights: got 'torch.int64"),
    (torch.ones(1, 2), [[[0, 1]]], [[[0, 1]]], r"source: got .*\(1, 1, 2\)'; expected int64 of shape \(1, 2, 2\)"),
    (torch.ones(1, 1), [[[0, 1]]], [[[0, 1]]] * 2, r"target: got .*expected int64 of shape \(1, T, 2\)"),
    (torch.ones(1, 1), [[[0, 1]]], [[[0, 1], [3, 2]]], r"target\[0,1\]: got \[3, 2\]; expected 0 <= first <= end"),
    (torch.ones(1, 1), [[[-1, 1]]], [[[0, 1]]], r"source\[0,0\]: got \[-1, 1\]"),
])  # fmt: skip
def test_bad_input_is_named(weights: Tensor, source: list, target: list, message: str) -> None:
    with pytest.raises(DataError, match=message):
        transfer(weights, torch.tensor(source), torch.tensor(target))
