"""Estimators without a critic, by hand and against plain loops: groups, credit weights, reward-to-go, vine."""

from __future__ import annotations

import math
import statistics

import helpers
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from apportion import Rollouts, advantages, credit, segments
from apportion.advantages._weights import credit_weights
from apportion.errors import ConfigError, DataError
from apportion.types import Estimator

NAN = float("nan")
GROUP_METHODS = (advantages.group_relative, advantages.leave_one_out)


def run(method: Estimator, rewards: list[list[float]], group: list[int], **evidence: Tensor) -> Tensor:
    """Return the advantages (B,T) of rows in which a NaN reward is a position without a token."""
    given_rewards = torch.tensor(rewards)
    rollouts = helpers.rollouts(~given_rewards.isnan(), sorted(evidence), group=torch.tensor(group), **evidence)
    return method(given_rewards, segments.tokens()(rollouts), rollouts).advantages


def assert_near(got: Tensor, expected: list[list[float]], within: float = 1e-5) -> None:
    torch.testing.assert_close(got, torch.tensor(expected), rtol=0, atol=within)


# rows of group 8 have Σr = 1, 2, 6 (mean 3, squared deviations 4+1+9 = 14, /2 → std √7 = 2.645751), of group 3 5 and 1
# (mean 3, std √8 = 2.828427), in no order; the row without tokens is nobody's; group 4 has one row
REWARDS = [[0.0, 1, NAN], [5, NAN, NAN], [1, NAN, 1], [NAN, NAN, NAN], [2, 2, 2], [NAN, 0, 1], [7, NAN, NAN]]
GROUP = [8, 3, 8, 8, 8, 3, 4]


def rows_of(values: list[float]) -> list[list[float]]:
    return [[0.0 if math.isnan(r) else a for r in row] for a, row in zip(values, REWARDS, strict=True)]


def test_group_relative_by_hand():
    a, b = 2.645751 + 1e-4, 2.828427 + 1e-4
    assert_near(run(advantages.group_relative(), REWARDS, GROUP), rows_of([-2 / a, 2 / b, -1 / a, 0, 3 / a, -2 / b, 0]))
    assert_near(run(advantages.group_relative(std=False), REWARDS, GROUP), rows_of([-2, 2, -1, 0, 3, -2, 0]))


def test_leave_one_out_by_hand():
    # 1 − (2+6)/2 = −3; 5 − 1; 2 − (1+6)/2 = −1.5; 6 − (1+2)/2 = 4.5; 1 − 5
    assert_near(run(advantages.leave_one_out(), REWARDS, GROUP), rows_of([-3, 4, -1.5, 0, 4.5, -4, 0]))


def test_the_returns_of_a_group_method_are_the_totals():
    rewards = torch.tensor(REWARDS)
    rollouts = helpers.rollouts(~rewards.isnan(), group=torch.tensor(GROUP))
    for factory in GROUP_METHODS:
        out = factory()(rewards, segments.tokens()(rollouts), rollouts)
        assert_near(out.returns, rows_of([1, 5, 2, 0, 6, 1, 7]))


def test_statistics_count_groups_that_teach_nothing():
    rewards = torch.tensor([[1.0, 1], [2, 0], [3, 0], [1, 4], [4, 4], [NAN, NAN]])
    rollouts = helpers.rollouts(~rewards.isnan(), group=torch.tensor([0, 0, 1, 2, 2, 5]))
    for method in (*(f() for f in GROUP_METHODS), advantages.reinforce_pp(baseline="group")):
        found = method.stats(rewards, segments.tokens()(rollouts), rollouts)
        assert {k: (int(a), int(b)) for k, (a, b) in found.items()} == {
            "advantages/lone_rate": (1, 3),
            "advantages/flat_rate": (1, 3),
        }
    assert advantages.reinforce_pp().stats(rewards, segments.tokens()(rollouts), rollouts) == {}


@settings(max_examples=200)
@given(
    totals=st.lists(st.floats(-50, 50, width=32), min_size=1, max_size=9),
    groups=st.lists(st.integers(0, 2), min_size=9, max_size=9),
    shift=st.sampled_from((0.0, 1000.0)),
)
def test_group_methods_against_their_definitions(totals, groups, shift):
    totals, groups = [t + shift for t in totals], groups[: len(totals)]
    rewards = [[t, 0.0] for t in totals]
    got = {f.__name__: run(f(), rewards, groups)[:, 0].tolist() for f in GROUP_METHODS}
    for i, total in enumerate(totals):
        own = [t for t, g in zip(totals, groups, strict=True) if g == groups[i]]
        others = [t for j, (t, g) in enumerate(zip(totals, groups, strict=True)) if g == groups[i] and j != i]
        near = max(own) - min(own) <= 1e-5 * max(map(abs, own))  # the two sides of "equal up to rounding"
        if len(own) == 1 or max(own) == min(own):
            assert got["group_relative"][i] == got["leave_one_out"][i] == 0
        elif not near:
            expected = (total - statistics.fmean(own)) / (statistics.stdev(own) + 1e-4)
            assert got["group_relative"][i] == pytest.approx(expected, abs=2e-4 * (1 + shift / 10))
            assert got["leave_one_out"][i] == pytest.approx(total - statistics.fmean(others), abs=1e-3)


@given(a=st.floats(-100, 100, width=32), b=st.floats(-100, 100, width=32))
def test_leave_one_out_of_two_is_their_difference(a, b):
    got = run(advantages.leave_one_out(), [[a], [b]], [0, 0])
    tiny = 1.1e-6 * max(abs(a), abs(b))
    assert got.squeeze(1).tolist() == pytest.approx([a - b, b - a], rel=1e-5, abs=1e-5 * max(abs(a), abs(b)) + tiny)


@pytest.mark.parametrize("length", [3, 7, 64, 500])
def test_equal_scores_teach_nothing_however_their_credit_rounds(length):
    """A redistribution keeps a sum only up to rounding, which dividing by a tiny spread would make an advantage of."""
    mask = torch.arange(length) < torch.tensor([[length], [length // 2], [1 + length // 3], [length]])
    rollouts = helpers.rollouts(
        mask, ["reward_attention"], group=torch.zeros(4).long(), scores=torch.full((4,), 1000.1), seed=length
    )
    rewards, _ = credit.apply(credit.attention(), rollouts)
    for factory in GROUP_METHODS:
        out = factory()(rewards, segments.tokens()(rollouts), rollouts)
        assert (out.advantages == 0).all()


def test_huge_totals_do_not_overflow_the_deviation():
    got = run(advantages.group_relative(), [[1e30], [2e30], [6e30]], [0, 0, 0])
    assert_near(got, [[-2 / 7**0.5], [-1 / 7**0.5], [3 / 7**0.5]])


# --- credit weights ---------------------------------------------------------------------------------------------------


def weights_by_loop(share: list[float], mix: float, cap: float | None) -> list[float]:
    """Return min(cap, c·w) of one row's tokens: each round puts what is above the cap at it and scales the rest up."""
    n = len(share)
    raw = [1 - mix + mix * n * s for s in share]
    held: set[int] = set()
    while True:
        left = n - len(held) * (cap or 0)
        rest = sum(w for i, w in enumerate(raw) if i not in held)
        free = n - len(held)
        now = [cap if i in held else (w * left / rest if rest > 0 else left / free) for i, w in enumerate(raw)]
        over = {i for i, w in enumerate(now) if cap is not None and i not in held and w > cap * (1 + 1e-12)}
        if not over:
            return now
        held |= over


SHARES = st.lists(st.one_of(st.just(0.0), st.floats(0.001, 100)), min_size=1, max_size=12)


@settings(max_examples=300)
@given(
    rows=st.lists(SHARES, min_size=1, max_size=4),
    mix=st.sampled_from((0.0, 0.3, 0.8, 1.0)),
    cap=st.sampled_from((None, 1.0, 1.2, 2.0, 3.0, 100.0)),
    seed=st.integers(0, 1000),
)
def test_weights_have_mean_one_and_stay_under_the_cap(rows, mix, cap, seed):
    length = max(map(len, rows)) + 2
    generator = torch.Generator().manual_seed(seed)
    share, on = torch.zeros(len(rows), length), torch.zeros(len(rows), length, dtype=torch.bool)
    for i, row in enumerate(rows):
        row = [1.0] * len(row) if sum(row) == 0 else row
        places = torch.randperm(length, generator=generator)[: len(row)]
        share[i, places] = torch.tensor(row) / sum(row)
        on[i, places] = True
    got, held = credit_weights(share, on, mix, cap)
    assert (got[~on] == 0).all() and not held[~on].any() and (got >= 0).all()
    for i in range(len(rows)):
        own = got[i][on[i]]
        assert float(own.mean()) == pytest.approx(1.0, abs=1e-5)
        assert cap is None or float(own.max()) <= cap * (1 + 1e-6)
        assert own.tolist() == pytest.approx(weights_by_loop(share[i][on[i]].tolist(), mix, cap), rel=1e-3, abs=1e-4)


def test_weights_by_hand():
    on = torch.ones(1, 4, dtype=torch.bool)
    # β=1: 4·share = 2.4 1.2 .4 0; the cap 1.5 leaves 2.5 for 1.2 + .4: ×1.5625 = 1.875 .625; again: 1 for .4: ×2.5
    got, held = credit_weights(torch.tensor([[0.6, 0.3, 0.1, 0.0]]), on, 1.0, 1.5)
    assert_near(got, [[1.5, 1.5, 1.0, 0.0]])
    assert held.tolist() == [[True, True, False, False]]
    # all of the credit on one token: the others have no weight to scale up and share what is left evenly
    assert_near(credit_weights(torch.tensor([[0.0, 1.0, 0.0, 0.0]]), on, 1.0, 3.0)[0], [[1 / 3, 3.0, 1 / 3, 1 / 3]])
    # β=.5: .5 + 2·share = .5 2.5 .5 .5 stays under 3; capped at 2: the 2 left for 1.5: .6667 each
    share = torch.tensor([[0.0, 1.0, 0.0, 0.0]])
    assert_near(credit_weights(share, on, 0.5, 3.0)[0], [[0.5, 2.5, 0.5, 0.5]])
    assert_near(credit_weights(share, on, 0.5, 2.0)[0], [[2 / 3, 2.0, 2 / 3, 2 / 3]])
    assert_near(credit_weights(share, on, 0.7, 1.0)[0], [[1.0, 1.0, 1.0, 1.0]])


@pytest.mark.parametrize("factory", GROUP_METHODS)
def test_credit_weighs_the_advantage_and_keeps_its_mean(factory):
    share = torch.tensor([[0.5, 0.3, 0.2, NAN], [0.0, 1.0, NAN, NAN], [0.0, 0, 0, 0]])
    rewards = [[1.0, 0, 0, NAN], [0, 4.0, NAN, NAN], [0, 0, 0, 2.0]]
    plain = run(factory(), rewards, [0, 0, 0])
    got = run(factory(credit_mix=0.5), rewards, [0, 0, 0], credit_share=share)
    # .5 + .5·3·share = 1.25 .95 .8; .5 + .5·2·share = .5 1.5; no mass becomes uniform
    scale = torch.tensor([[1.25, 0.95, 0.8, 0], [0.5, 1.5, 0, 0], [1, 1, 1, 1]])
    torch.testing.assert_close(got, plain * scale)
    torch.testing.assert_close(got.sum(dim=1), plain.sum(dim=1))
    mask = ~torch.tensor(rewards).isnan()
    rollouts = helpers.rollouts(mask, ["credit_share"], group=torch.zeros(3).long(), credit_share=share)
    found = factory(credit_mix=1.0, cap=1.6).stats(torch.tensor(rewards), segments.tokens()(rollouts), rollouts)
    assert tuple(map(int, found["advantages/capped_rate"])) == (1, 9)
    assert tuple(map(int, found["advantages/share_fallback_rate"])) == (1, 3)


def test_a_uniform_share_changes_nothing():
    mask = helpers.bools([[1, 1, 1], [1, 0, 1], [0, 1, 0]])
    rollouts = helpers.rollouts(mask, group=torch.zeros(3).long())
    share = credit.uniform().share(rollouts)
    rewards, ids = torch.randn(3, 3), segments.tokens()(rollouts)
    for factory in GROUP_METHODS:
        plain = factory()(rewards, ids, rollouts).advantages
        for mix in (0.3, 1.0):
            got = factory(credit_mix=mix)(rewards, ids, rollouts.with_evidence(credit_share=share)).advantages
            torch.testing.assert_close(got, plain)


@pytest.mark.parametrize("factory", GROUP_METHODS)
@pytest.mark.parametrize(("value", "got"), [(-0.5, "-0.5"), (NAN, "nan"), (float("inf"), "inf")])
def test_a_share_that_is_no_share_is_refused_with_its_rollout(factory, value, got):
    share = torch.tensor([[0.5, 0.5], [0.5, value]])
    with pytest.raises(DataError, match=rf"credit_share'\] of rollout 1, token 1: got {got}"):
        run(factory(credit_mix=0.5), [[1.0, 0], [0, 1]], [0, 0], credit_share=share)
    with pytest.raises(DataError, match="credit_share"):
        run(factory(credit_mix=0.5), [[1.0, 0], [0, 1]], [0, 0])


# --- reward-to-go -----------------------------------------------------------------------------------------------------


def actions(rewards: list[list[float]], ids: list[list[int]], group: list[int]) -> tuple[Tensor, Tensor, Rollouts]:
    given_ids = torch.tensor(ids)
    return torch.tensor(rewards), given_ids, helpers.rollouts(given_ids >= 0, group=torch.tensor(group))


def test_monte_carlo_by_hand():
    # actions: {0,1}, {3}, {4,5} of rewards 1+2, 4, 0+8; γ=.5: 8, 4+4 = 8, 3+4 = 7; γ=1: 8, 12, 15
    given_batch = actions(
        [[1.0, 2, NAN, 4, 0, 8], [NAN, 3, NAN, NAN, NAN, NAN]], [[0, 0, -1, 1, 2, 2], [-1, 0, *[-1] * 4]], [0, 1]
    )
    half = advantages.monte_carlo(gamma=0.5)(*given_batch)
    assert_near(half.advantages, [[7.0, 7, 0, 8, 8, 8], [0, 3, 0, 0, 0, 0]])
    whole = advantages.monte_carlo()(*given_batch)
    assert_near(whole.advantages, [[15.0, 15, 0, 12, 8, 8], [0, 3, 0, 0, 0, 0]])
    assert torch.equal(whole.returns, whole.advantages)
    assert (advantages.monte_carlo(gamma=0.0)(*given_batch).advantages[0] == torch.tensor([3.0, 3, 0, 4, 8, 8])).all()


@given(seed=st.integers(0, 10_000), gamma=st.sampled_from((0.0, 0.5, 0.99, 1.0)))
def test_monte_carlo_is_gae_with_no_critic_and_lambda_one(seed, gamma):
    mask = torch.rand(4, 7, generator=torch.Generator().manual_seed(seed)) < 0.7
    rollouts = helpers.rollouts(mask, ["values"], seed=seed, values=torch.zeros(4, 7))
    rewards = helpers.poison(torch.randn(4, 7, generator=torch.Generator().manual_seed(seed)), mask)
    ids = segments.tokens()(rollouts)
    got = advantages.monte_carlo(gamma)(rewards, ids, rollouts)
    expected = advantages.gae(gamma, 1.0)(rewards, ids, rollouts)
    torch.testing.assert_close(got.advantages, expected.advantages, rtol=1e-4, atol=1e-5)


def test_reinforce_pp_by_hand():
    # Σr 4 and 2, mean 3, taken off the last action's reward: rows (1, 3−3) and (2−3); γ=.5
    given_batch = actions(
        [[1.0, 3, NAN], [NAN, 2, NAN], [5, NAN, NAN]], [[0, 1, -1], [-1, 0, -1], [0, -1, -1]], [6, 6, 2]
    )
    got = advantages.reinforce_pp(baseline="group")(*given_batch)
    assert_near(got.advantages, [[1.0, 0, 0], [0, -1, 0], [0, 0, 0]])
    assert_near(got.returns, [[4.0, 3, 0], [0, 2, 0], [5, 0, 0]])
    assert_near(
        advantages.reinforce_pp(baseline="group", gamma=0.5)(*given_batch).advantages,
        [[1.0, 0, 0], [0, -1, 0], [0, 0, 0]],
    )
    plain, expected = advantages.reinforce_pp()(*given_batch), advantages.monte_carlo()(*given_batch)
    assert torch.equal(plain.advantages, expected.advantages)


def test_with_the_score_at_the_end_the_group_baseline_is_the_group_methods():
    rewards = [[0.0, 0, 3], [0, 1, NAN], [0, 5, NAN], [2, NAN, NAN]]
    got = run(advantages.reinforce_pp(baseline="group"), rewards, [0, 1, 0, 1])
    torch.testing.assert_close(got, run(advantages.group_relative(std=False), rewards, [0, 1, 0, 1]))


# --- vine -------------------------------------------------------------------------------------------------------------


def test_vine_by_hand():
    # V before the actions {0}, {2,3}, {4}: .5, .25, 1; rewards 0, 1+1, 3
    # A: 0 + .25 − .5; 2 + 1 − .25; 3 + 0 − 1. Values inside an action are not read
    values = torch.tensor([[0.5, NAN, 0.25, NAN, 1.0], [NAN, 0.5, NAN, NAN, NAN]])
    ids = torch.tensor([[0, -1, 1, 1, 2], [-1, 0, -1, -1, -1]])
    rollouts = helpers.rollouts(ids >= 0, ["vine_values"], vine_values=values, dirty=False)
    out = advantages.vine()(torch.tensor([[0.0, NAN, 1, 1, 3], [NAN, 2, NAN, NAN, NAN]]), ids, rollouts)
    assert_near(out.advantages, [[-0.25, 0, 2.75, 2.75, 2.0], [0, 1.5, 0, 0, 0]])
    assert_near(out.returns, [[0.25, 0, 3, 3, 3], [0, 2, 0, 0, 0]])


def test_vine_is_gae_at_lambda_zero_with_those_values():
    mask = torch.rand(5, 8) < 0.7
    rollouts = helpers.rollouts(mask, ["values"], seed=3)
    rewards, ids = torch.randn(5, 8), segments.tokens()(rollouts)
    expected = advantages.gae(lam=0.0)(rewards, ids, rollouts)
    got = advantages.vine()(rewards, ids, rollouts.with_evidence(vine_values=rollouts.evidence["values"]))
    torch.testing.assert_close(got.advantages, expected.advantages)
    torch.testing.assert_close(got.returns, expected.returns)


def test_vine_requires_its_samples_and_refuses_values_that_are_not_finite():
    assert advantages.vine().needs == {"vine_values"} == advantages.vine(9).needs
    assert advantages.vine(3).needs == {"vine_values@samples=3"}
    mask = helpers.bools([[1, 1], [1, 1]])
    rollouts = helpers.rollouts(mask, ["vine_values"], vine_values=torch.tensor([[1.0, 1], [NAN, 1]]))
    ids = segments.tokens()(rollouts)
    with pytest.raises(DataError, match=r"vine_values'\] of rollout 1"):
        advantages.vine()(torch.ones(2, 2), ids, rollouts)
    with pytest.raises(DataError, match="vine_values@samples=2"):
        advantages.vine(2)(torch.ones(2, 2), ids, rollouts)


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda: advantages.group_relative(credit_mix=1.5), "group_relative.credit_mix"),
        (lambda: advantages.group_relative(cap=0.9), "group_relative.cap"),
        (lambda: advantages.group_relative(std="yes"), "group_relative.std"),
        (lambda: advantages.leave_one_out(credit_mix=-1), "leave_one_out.credit_mix"),
        (lambda: advantages.leave_one_out(cap=NAN), "leave_one_out.cap"),
        (lambda: advantages.leave_one_out(cap=float("inf")), "leave_one_out.cap"),
        (lambda: advantages.monte_carlo(gamma=1.1), "monte_carlo.gamma"),
        (lambda: advantages.reinforce_pp(baseline="mean"), "reinforce_pp.baseline"),
        (lambda: advantages.reinforce_pp(gamma=-0.1), "reinforce_pp.gamma"),
        (lambda: advantages.vine(samples=0), "vine.samples"),
        (lambda: advantages.vine(samples=2.0), "vine.samples"),
    ],
)
def test_settings_outside_their_range_are_refused_by_name(make, field):
    with pytest.raises(ConfigError, match=field.replace(".", r"\.")):
        make()
