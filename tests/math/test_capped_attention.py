"""Capped attention against a slow water-filling reference, and the corners of `cap`, `floor` and tiny mass."""

from __future__ import annotations

import time

import helpers
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from apportion import credit
from apportion.registry import EvidenceKey


def water_fill(weights: list[float], cap: float) -> list[float]:
    """Return the shares of one row's tokens: pour the excess over the cap into the others, one token at a time."""
    limit = max(cap, 1.0 / len(weights))
    total = sum(weights)
    shares = [w / total for w in weights] if total > 0 else [1.0 / len(weights)] * len(weights)
    fixed: set[int] = set()
    while True:
        over = [i for i, s in enumerate(shares) if i not in fixed and s > limit + 1e-15]
        if not over:
            return shares
        fixed.add(max(over, key=lambda i: shares[i]))
        free = [i for i in range(len(shares)) if i not in fixed]
        room, left = sum(weights[i] for i in free), 1.0 - limit * len(fixed)
        for i in fixed:
            shares[i] = limit
        for i in free:
            shares[i] = left * (weights[i] / room if room > 0 else 1.0 / len(free))


def shares(weights: list[float], **settings: float) -> torch.Tensor:
    mask = torch.ones(1, len(weights), dtype=torch.bool)
    rollouts = helpers.rollouts(mask, ["reward_attention"], reward_attention=torch.tensor([weights]))
    return credit.attention(mix=1.0, **settings).share(rollouts)[0]


WEIGHT = st.one_of(st.just(0.0), st.floats(2.0**-20, 1.0, width=32), st.sampled_from((1e-9, 1.0, 1e3)))


@given(weights=st.lists(WEIGHT, min_size=1, max_size=12), cap=st.floats(0.02, 1.0))
def test_against_water_filling(weights, cap):
    got = shares(weights, cap=cap)
    torch.testing.assert_close(got.double(), torch.tensor(water_fill(weights, cap)).double(), rtol=1e-4, atol=2e-6)
    assert got.max() <= max(cap, 1 / len(weights)) + 1e-6
    assert (got >= 0).all()


def test_against_water_filling_in_a_batch_with_holes():
    generator = torch.Generator().manual_seed(3)
    mask = torch.rand(64, 20, generator=generator) < 0.6
    mask[0] = False
    mass = torch.rand(64, 20, generator=generator) ** 8
    rollouts = helpers.rollouts(mask, ["reward_attention"], reward_attention=mass)
    got = credit.attention(mix=1.0, cap=0.15).share(rollouts)
    for row in range(64):
        kept = mass[row][mask[row]].tolist()
        if kept:
            torch.testing.assert_close(got[row][mask[row]], torch.tensor(water_fill(kept, 0.15)), rtol=1e-4, atol=2e-6)
    assert (got[~mask] == 0).all()


@pytest.mark.parametrize("full", range(1, 11))
def test_tokens_at_the_cap_beside_tokens_of_no_weight_stay_non_negative(full):
    """`full` equal tokens at 1/`full` and as many without weight: rounding must not leave a negative share."""
    for cap in (1.0 / full, 0.9 / full, 0.5 / full):
        got = shares([1.0] * full + [0.0] * full + [1e-6], cap=cap)
        assert (got >= 0).all(), got
        assert abs(float(got.sum()) - 1.0) < 1e-5


def test_a_tiny_cap_is_uniform_and_does_not_take_ages():
    started = time.perf_counter()
    torch.testing.assert_close(shares([5.0, 1.0, 0.0, 2.0], cap=1e-5), torch.full((4,), 0.25))
    assert time.perf_counter() - started < 1.0, "the number of passes must be bounded by the tokens, not by 1/cap"


@pytest.mark.parametrize("scale", [1e-11, 1e-6, 1e6, 1e29, 1e37])
@pytest.mark.parametrize("settings", [{}, {"floor": 0.3}, {"cap": 0.3}, {"floor": 0.2, "cap": 0.3}])
def test_shares_do_not_depend_on_the_scale_of_the_evidence(scale, settings):
    """Evidence need not be normalised: every scale that is mass at all gives the same shares."""
    weights = [8.0, 1.0, 0.5, 0.25, 0.125, 4.0]
    torch.testing.assert_close(shares([w * scale for w in weights], **settings), shares(weights, **settings))


def test_a_sum_beyond_float32_is_still_mass():
    """Each value is finite, though their sum is not."""
    torch.testing.assert_close(shares([3e38, 3e38, 1.5e38]), torch.tensor([0.4, 0.4, 0.2]))


def test_floor_one_is_uniform_and_zero_mass_stays_uniform():
    torch.testing.assert_close(shares([9.0, 1.0, 0.0, 0.0], floor=1.0), torch.full((4,), 0.25))
    torch.testing.assert_close(shares([0.0] * 4, floor=0.5, cap=0.5), torch.full((4,), 0.25))


def test_exclude_self_is_a_reading_of_its_own():
    """The producer leaves the reader's column out; where that leaves nothing the row is uniform, and counted."""
    name = EvidenceKey("reward_attention", exclude_self=True)
    method = credit.attention(exclude_self=True)
    assert method.needs == {name}
    mask = helpers.bools([[1, 1, 1]])
    last = helpers.rollouts(mask, [name], **{name: torch.tensor([[0.0, 0, 0]])})
    torch.testing.assert_close(method.share(last), torch.full((1, 3), 1 / 3))
    assert method.stats(last, last.logprobs, last.logprobs)["credit/fallback_rate"][0] == 1
