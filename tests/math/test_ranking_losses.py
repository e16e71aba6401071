"""Bradley–Terry and Plackett–Luce on rankings, against loops over pairs and orders, and by hand."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from apportion import losses
from apportion.errors import ApportionError, ConfigError, DataError

NAN = float("nan")
SETTINGS = [(ties, weight) for ties in ("skip", "half") for weight in ("prompt", "pair")]
Loss = Callable[..., tuple[Tensor, Tensor]]


def members(groups: Tensor, ranks: Tensor) -> list[list[int]]:
    """Return the judged rows of each group."""
    found: dict[int, list[int]] = {}
    for row, group in enumerate(groups.tolist()):
        if not math.isnan(float(ranks[row])):
            found.setdefault(group, []).append(row)
    return list(found.values())


def slow_bradley_terry(scores: Tensor, groups: Tensor, ranks: Tensor, margins: Tensor, ties: str, weight: str) -> Any:
    """Return (sum, count) by a loop over the pairs of every prompt."""
    total, count = scores.sum() * 0, 0
    for rows in members(groups, ranks):
        terms = []
        for a, b in itertools.combinations(rows, 2):
            gap = scores[a] - scores[b] - (margins[a] - margins[b])
            if ranks[a] == ranks[b]:
                if ties == "half":
                    terms.append(0.5 * torch.log1p(torch.exp(-gap)) + 0.5 * torch.log1p(torch.exp(gap)))
            else:
                terms.append(torch.log1p(torch.exp(-gap if ranks[a] < ranks[b] else gap)))
        if terms:
            total = total + (torch.stack(terms).mean() if weight == "prompt" else torch.stack(terms).sum())
            count += 1 if weight == "prompt" else len(terms)
    return total, count


def slow_plackett_luce(scores: Tensor, groups: Tensor, ranks: Tensor, margins: Tensor, ties: str, weight: str) -> Any:
    """Return (sum, count) by a loop over the choices of every prompt."""
    total, count = scores.sum() * 0, 0
    own = scores - margins
    for rows in members(groups, ranks):
        likelihood, pairs = scores.sum() * 0, 0
        for a in rows:
            below = [b for b in rows if ranks[b] > ranks[a]]
            level = [b for b in rows if ranks[b] == ranks[a] and b != a]
            after = torch.logsumexp(own[[a, *below]], 0) - own[a]
            before = torch.logsumexp(own[[a, *below, *level]], 0) - own[a]
            likelihood = likelihood + (after if ties == "skip" else 0.5 * (after + before))
            pairs += 2 * len(below) + (len(level) if ties == "half" else 0)
        if pairs:
            total = total + likelihood * (1 if weight == "prompt" else pairs / 2)
            count += 1 if weight == "prompt" else pairs // 2
    return total, count


SLOW = {"bradley_terry": slow_bradley_terry, "plackett_luce": slow_plackett_luce}
METHODS: list[Loss] = [losses.bradley_terry, losses.plackett_luce]
each_loss = pytest.mark.parametrize("name", SLOW)


def batch(size: int, kind: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (scores, groups, ranks, margins) of five prompts of `size` completions, shuffled."""
    generator = torch.Generator().manual_seed(size)
    count = 5 * size
    groups = (torch.arange(5).repeat_interleave(size) * 7 - 3)[torch.randperm(count, generator=generator)]
    scores = 3 * torch.randn(count, generator=generator, dtype=dtype)
    ranks = torch.rand(count, generator=generator, dtype=torch.float64).argsort().double() + 1
    if kind != "strict":
        ranks = torch.randint(1, max(2, size - 1), (count,), generator=generator).double()
    if kind == "unjudged":
        ranks[torch.rand(count, generator=generator) < 0.3] = NAN
    return scores, groups, ranks, torch.randn(count, generator=generator, dtype=dtype)


@each_loss
@pytest.mark.parametrize(("ties", "weight"), SETTINGS)
@pytest.mark.parametrize("kind", ["strict", "tied", "unjudged"])
@pytest.mark.parametrize("size", range(2, 10))
def test_value_and_gradient_are_those_of_a_loop(name: str, ties: str, weight: str, kind: str, size: int) -> None:
    for dtype, close in ((torch.float64, 1e-10), (torch.float32, 1e-6)):
        given, groups, ranks, margins = batch(size, kind, dtype)
        for own in (margins, torch.zeros_like(margins)):
            scores, again = (given.to(own_dtype, copy=True).requires_grad_() for own_dtype in (dtype, torch.float64))
            settings = {"ties": ties, "weight": weight}
            total, count = getattr(losses, name)(scores, groups, ranks, margins=own, **settings)
            expected, expected_count = SLOW[name](again, groups, ranks, own.double(), **settings)
            assert total.shape == count.shape == () and total.dtype == count.dtype == dtype
            assert float(count) == expected_count and not count.requires_grad
            mean, slow_mean = total / count.clamp_min(1), expected / max(1, expected_count)
            mean.backward()
            slow_mean.backward()
            assert float(mean.detach()) == pytest.approx(float(slow_mean.detach()), abs=close, rel=close)
            assert scores.grad is not None and again.grad is not None
            torch.testing.assert_close(scores.grad.double(), again.grad, atol=close, rtol=0)


def test_one_ranking_by_hand() -> None:
    """Scores 1, 0, −1 in the order a > b = c."""
    scores, groups, ranks = torch.tensor([1.0, 0.0, -1.0]).double(), torch.zeros(3).long(), torch.tensor([1, 2, 2])
    soft = [math.log1p(math.exp(-gap)) for gap in (1.0, 2.0, -1.0)]  # a over b, a over c, c over b
    tie = 0.5 * (soft[0] + soft[2])  # b and c are 1 apart as well
    skip, half = soft[0] + soft[1], soft[0] + soft[1] + tie
    found = {
        s: [float(x) for x in losses.bradley_terry(scores, groups, ranks, ties=s[0], weight=s[1])] for s in SETTINGS
    }
    assert found["skip", "pair"] == pytest.approx([skip, 2]) and found["skip", "prompt"] == pytest.approx([skip / 2, 1])
    assert found["half", "pair"] == pytest.approx([half, 3]) and found["half", "prompt"] == pytest.approx([half / 3, 1])
    first = math.log(1 + math.exp(-1) + math.exp(-2))  # a is chosen among all three
    assert float(losses.plackett_luce(scores, groups, ranks)[0]) == pytest.approx(first)
    assert float(losses.plackett_luce(scores, groups, ranks, ties="half")[0]) == pytest.approx(first + tie)
    # two tied: the mean over both orders of all three
    orders = [losses.plackett_luce(scores, groups, torch.tensor(order))[0] for order in ([1, 2, 3], [1, 3, 2])]
    assert float(sum(orders) / 2) == pytest.approx(first + tie)
    # margins 2, 1, 0: all gaps of a are 0 and 0
    margins = torch.tensor([2.0, 1.0, 0.0])
    assert float(losses.bradley_terry(scores, groups, ranks, margins=margins)[0]) == pytest.approx(math.log(2))


@pytest.mark.parametrize(("ties", "weight"), SETTINGS)
def test_of_pairs_both_losses_are_one(ties: str, weight: str) -> None:
    scores, groups, ranks, margins = batch(2, "tied", torch.float64)
    ranks[:3] = 1.0
    one, other = (loss(scores, groups, ranks, margins=margins, ties=ties, weight=weight) for loss in METHODS)
    assert torch.allclose(one[0], other[0], atol=1e-12) and torch.equal(one[1], other[1])


@each_loss
def test_what_takes_no_part_has_no_gradient(name: str) -> None:
    loss = getattr(losses, name)
    scores = torch.tensor([0.5, NAN, 1.0, 2.0, 3.0], requires_grad=True)
    total, count = loss(scores, torch.tensor([0, 0, 0, 1, 1]), torch.tensor([1.0, NAN, 2.0, NAN, 1.0]))
    total.backward()
    assert float(count) == 1 and float(total.detach()) == pytest.approx(math.log1p(math.exp(0.5)))
    assert scores.grad is not None and scores.grad[[1, 3, 4]].tolist() == [0.0, 0.0, 0.0] and scores.grad[0] < 0
    empty = torch.zeros(3, requires_grad=True)
    for ranks in (torch.full((3,), NAN), torch.ones(3), torch.tensor([1, 1, 1])):
        total, count = loss(empty, torch.zeros(3).long(), ranks)
        total.backward()
        assert float(total.detach()) == float(count) == 0.0
    assert empty.grad is not None and empty.grad.tolist() == [0.0, 0.0, 0.0]
    none = torch.zeros(0, requires_grad=True)
    assert [float(x.detach()) for x in loss(none, torch.zeros(0).long(), torch.zeros(0))] == [0.0, 0.0]


@each_loss
def test_large_scores_stay_finite(name: str) -> None:
    scores = torch.tensor([-3e4, 3e4, 0.0], requires_grad=True)
    total, _ = getattr(losses, name)(scores, torch.zeros(3).long(), torch.tensor([1, 2, 3]), weight="pair")
    total.backward()
    assert math.isfinite(float(total.detach())) and float(total.detach()) > 6e4
    assert scores.grad is not None and bool(scores.grad.isfinite().all())


@each_loss
@pytest.mark.parametrize(
    ("changes", "error", "field"),
    [
        ({"ties": "drop"}, ConfigError, "ties"),
        ({"weight": "token"}, ConfigError, "weight"),
        ({"groups": torch.zeros(2).long()}, DataError, "groups"),
        ({"groups": torch.zeros(3)}, DataError, "groups"),
        ({"ranks": torch.ones(3, 1)}, DataError, "ranks"),
        ({"scores": torch.ones(3, 1)}, DataError, "scores"),
        ({"margins": torch.ones(4)}, DataError, "margins"),
        ({"margins": torch.tensor([0.0, NAN, 0.0])}, DataError, "margins"),
    ],
)
def test_wrong_arguments_are_named(name: str, changes: dict[str, Any], error: type[ApportionError], field: str) -> None:
    given = {"scores": torch.zeros(3), "groups": torch.zeros(3).long(), "ranks": torch.tensor([1, 2, 3])} | changes
    with pytest.raises(error) as caught:
        getattr(losses, name)(given.pop("scores"), given.pop("groups"), given.pop("ranks"), **given)
    assert caught.value.field == field
