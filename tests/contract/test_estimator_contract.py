"""The contract of every estimator: what each must keep, whatever rewards, masks, actions and groups it is given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import helpers
import pytest
import torch
from examples import examples
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from apportion import Rollouts, advantages, segments
from apportion.types import Advantages, Estimator

BUILT_IN = {name: advantages.find(name) for name in advantages.names()}
VARIANTS: dict[str, Callable[[], Estimator]] = {
    "gae(gamma, lam, mean)": lambda: advantages.gae(gamma=0.9, lam=0.5, pooling="mean"),
    "group_relative(no std)": lambda: advantages.group_relative(std=False),
    "group_relative(credit)": lambda: advantages.group_relative(credit_mix=0.7, cap=1.5),
    "group_relative(credit alone)": lambda: advantages.group_relative(credit_mix=1.0),
    "group_relative(credit, no cap)": lambda: advantages.group_relative(credit_mix=1.0, cap=None),
    "leave_one_out(credit)": lambda: advantages.leave_one_out(credit_mix=0.4, cap=2.0),
    "monte_carlo(gamma)": lambda: advantages.monte_carlo(gamma=0.8),
    "reinforce_pp(group)": lambda: advantages.reinforce_pp(baseline="group"),
    "reinforce_pp(group, gamma)": lambda: advantages.reinforce_pp(baseline="group", gamma=0.9),
    "vine(3)": lambda: advantages.vine(samples=3),
}
ESTIMATORS: dict[str, Callable[[], Estimator]] = {**BUILT_IN, **VARIANTS}
every_estimator = pytest.mark.parametrize("make", ESTIMATORS.values(), ids=ESTIMATORS.keys())
SEEDS = st.integers(0, 10_000)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@st.composite
def masks(draw: st.DrawFn) -> Tensor:
    """(B,T) masks with holes, rows without tokens, rows of one token, and T=1."""
    length = draw(st.integers(1, 9))
    row = st.lists(st.booleans(), min_size=length, max_size=length)
    lone = st.integers(0, length - 1).map(lambda i: [j == i for j in range(length)])
    prefix = st.integers(0, length).map(lambda n: [j < n for j in range(length)])
    return torch.tensor(draw(st.lists(st.one_of(row, lone, prefix), min_size=1, max_size=6)), dtype=torch.bool)


def group_wise(method: Estimator) -> bool:
    return getattr(method, "group_wise", False)


def uses_share(method: Estimator) -> bool:
    return getattr(method, "uses_share", False)


def batch(method: Estimator, mask: Tensor, seed: int) -> tuple[Rollouts, Tensor, Tensor]:
    """Return rollouts on `mask` with groups in any order, rewards (B,T) and actions (B,T) of one or more tokens."""
    generator = torch.Generator().manual_seed(seed)
    group = torch.randint(0, 3, (len(mask),), generator=generator) * 7 - 4
    rollouts = helpers.rollouts(mask, sorted(method.needs), seed=seed, group=group)
    if "credit_share" in method.needs:  # rows that sum to 1, of any peakedness; some have no mass
        raw = torch.randn(mask.shape, generator=generator).exp() ** (seed % 4)
        raw = torch.where(mask & (torch.arange(len(mask)) % 3 != seed % 5)[:, None], raw, 0.0)
        share = raw / raw.sum(dim=1, keepdim=True).clamp_min(1e-9)
        rollouts = rollouts.with_evidence(credit_share=helpers.poison(share, mask))
    rewards = torch.randn(mask.shape, generator=generator)
    ids = segments.tokens()(rollouts)
    if seed % 2:  # join random neighbours: an id grows where a coin falls on heads
        coin = torch.randint(0, 2, mask.shape, generator=generator) * mask
        ids = torch.where(mask, (coin * ~((mask.cumsum(dim=1) == 1) & mask)).cumsum(dim=1), -1)
    return rollouts, helpers.poison(rewards, mask), ids


def tensors(rollouts: Rollouts) -> dict[str, Tensor]:
    """Return every tensor that the rollouts hold, evidence included, by name."""
    own = {k: v for k, v in vars(rollouts).items() if isinstance(v, Tensor)}
    return own | {f"evidence.{k}": v for k, v in rollouts.evidence.items()}


def assert_near(got: Advantages, expected: Advantages) -> None:
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@every_estimator
@examples(20)
@given(mask=masks(), seed=SEEDS, dtype=st.sampled_from(DTYPES))
def test_shape_float32_zeros_off_the_mask_one_number_an_action_and_nothing_mutated(make, mask, seed, dtype):
    method = make()
    rollouts, rewards, ids = batch(method, mask, seed)
    rollouts, rewards = helpers.cast(rollouts, dtype), rewards.to(dtype)
    before = {k: v.clone() for k, v in (tensors(rollouts) | {"rewards": rewards, "segments": ids}).items()}
    out = method(rewards, ids, rollouts)
    for name, got in out._asdict().items():
        assert got.shape == mask.shape and got.dtype == torch.float32, name
        assert (got[~mask] == 0).all(), f"{name}: something is left off the mask"
        assert torch.isfinite(got).all(), f"{name}: what stood off the mask leaked in"
        if not uses_share(method):
            seen = [{} for _ in mask]  # action -> its first token's number
            for row, found, own in zip(seen, got.tolist(), ids.tolist(), strict=True):
                assert all(row.setdefault(k, x) == x for k, x in zip(own, found, strict=True)), "not one an action"
    for name, value in (tensors(rollouts) | {"rewards": rewards, "segments": ids}).items():
        assert torch.equal(value.nan_to_num(7.0), before[name].nan_to_num(7.0)), f"{name} was mutated"


@every_estimator
@examples(20)
@given(mask=masks(), seed=SEEDS, scale=st.sampled_from((1e-30, 1e30, -1e30, 0.0)), alike=st.booleans())
def test_finite_for_extreme_rewards(make, mask, seed, scale, alike):
    method = make()
    rollouts, rewards, ids = batch(method, mask, seed)
    if alike:
        rewards = torch.where(mask, 1.0, rewards)
    total = torch.where(mask, rewards.abs(), 0).sum(dim=1).max().clamp_min(1e-9)
    values = {k: v * abs(scale) / 10 for k, v in rollouts.evidence.items() if "values" in k}
    out = method(rewards / total * scale, ids, rollouts.with_evidence(**values))
    assert torch.isfinite(out.advantages).all() and torch.isfinite(out.returns).all()


@every_estimator
@examples(20)
@given(mask=masks(), seed=SEEDS, left=st.integers(0, 3), right=st.integers(0, 3))
def test_padding_order_of_rows_and_names_of_groups_do_not_matter(make, mask, seed, left, right):
    method = make()
    rollouts, rewards, ids = batch(method, mask, seed)
    out = method(rewards, ids, rollouts)
    wide = torch.nn.functional.pad(rewards, (0, right), value=float("nan"))
    more = method(wide, torch.nn.functional.pad(ids, (0, right), value=-1), helpers.padded(rollouts, left, right))
    assert_near(Advantages(*(x[:, : mask.shape[1]] for x in more)), out)
    assert all((x[:, mask.shape[1] :] == 0).all() for x in more)
    order = torch.randperm(len(mask), generator=torch.Generator().manual_seed(seed))
    moved = rollouts.select(order)
    moved = replace(moved, group=-1000 * moved.group + 3)  # nor do the groups' names
    assert_near(method(rewards[order], ids[order], moved), Advantages(*(x[order] for x in out)))


@every_estimator
@examples(20)
@given(mask=masks(), seed=SEEDS)
def test_rows_or_groups_are_independent_of_one_another(make, mask, seed):
    method = make()
    rollouts, rewards, ids = batch(method, mask, seed)
    out = method(rewards, ids, rollouts)
    alone = rollouts.group if group_wise(method) else torch.arange(len(mask))
    for value in alone.unique():
        rows = (alone == value).nonzero().squeeze(1)
        part = method(rewards[rows], ids[rows], rollouts.select(rows))
        assert_near(part, Advantages(*(x[rows] for x in out)))


@every_estimator
@examples(20)
@given(mask=masks(), seed=SEEDS)
def test_rows_without_tokens_teach_nothing_to_others(make, mask, seed):
    """A row without tokens added to any group changes no other row."""
    method = make()
    rollouts, rewards, ids = batch(method, mask, seed)
    rows = torch.cat([torch.arange(len(mask)), torch.tensor([0])])
    emptied = torch.cat([mask, torch.zeros_like(mask[:1])])
    more = rollouts.select(rows)
    more = replace(more, mask=emptied, valid=emptied)
    bad, off = torch.full_like(rewards[:1], float("nan")), torch.full_like(ids[:1], -1)
    out = method(torch.cat([rewards, bad]), torch.cat([ids, off]), more)
    assert_near(Advantages(*(x[:-1] for x in out)), method(rewards, ids, rollouts))
    assert all((x[-1] == 0).all() for x in out)


@every_estimator
def test_what_an_estimator_declares_is_true(make):
    method = make()
    mask = helpers.bools([[1, 1, 1], [1, 1, 0]])
    rollouts, rewards, ids = batch(method, mask, 2)
    rollouts = replace(rollouts, group=torch.tensor([5, 5]))
    moved = method(rewards + torch.tensor([[0.0], [9.0]]), ids, rollouts).advantages[0]
    depends = (moved - method(rewards, ids, rollouts).advantages[0]).abs().max() > 1e-4
    assert bool(depends) == group_wise(method), "group_wise is not what it does"
    assert uses_share(method) == ("credit_share" in method.needs)
    assert getattr(method, "critic", True) == ("values" in method.needs)


@pytest.mark.parametrize("name", [n for n in ESTIMATORS if hasattr(ESTIMATORS[n](), "stats")])
@examples(20)
@given(mask=masks(), seed=SEEDS)
def test_statistics_add_up_over_groups(name, mask, seed):
    method = ESTIMATORS[name]()
    rollouts, rewards, ids = batch(method, mask, seed)
    whole = method.stats(rewards, ids, rollouts)
    parts = [
        method.stats(rewards[rows], ids[rows], rollouts.select(rows))
        for value in rollouts.group.unique()
        for rows in [(rollouts.group == value).nonzero().squeeze(1)]
    ]
    assert all(part.keys() == whole.keys() for part in parts)
    for key, (total, count) in whole.items():
        assert float(sum(p[key][0] for p in parts)) == float(total), key
        assert float(sum(p[key][1] for p in parts)) == float(count) >= float(total), key
