"""The contract of every credit method, and of some chains: what each must keep, whatever it is given."""

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

from apportion import Credit, Rollouts, credit

BUILT_IN = {name: credit.find(name) for name in credit.names()}
VARIANTS: dict[str, Callable[[], Credit]] = {
    "uniform(mix=0.3)": lambda: credit.uniform(mix=0.3),
    "attention(mix=0)": lambda: credit.attention(mix=0.0),
    "attention(mix=1)": lambda: credit.attention(mix=1.0),
    "attention(floor, cap)": lambda: credit.attention(floor=0.2, cap=0.3),
    "attention(exclude_self)": lambda: credit.attention(exclude_self=True, cap=0.5),
    "policy_attention(last)": lambda: credit.policy_attention(view="last"),
    "policy_attention(shifted)": lambda: credit.policy_attention(shifted=True, mix=1.0),
    "kl_penalty(adaptive)": lambda: credit.kl_penalty(coef=0.3, target=6.0),
    "abc": lambda: credit.chain(credit.attention(), credit.kl_penalty()),
    "ppo": lambda: credit.chain(credit.sparse(), credit.kl_penalty(coef=0.2)),
    "two redistributors": lambda: credit.chain(credit.attention(mix=0.5), credit.uniform(mix=0.5)),
    "prefix_difference(mix=.5)": lambda: credit.prefix_difference(mix=0.5),
    "prefix_difference(omit)": lambda: credit.prefix_difference(initial="omit"),
    "prefix, then kl": lambda: credit.chain(credit.prefix_difference(), credit.kl_penalty()),
    "implicit(unclipped, model)": lambda: credit.implicit(coef=0.5, clip=None, model="runs/dpo/final"),
    "attribution(mix=1)": lambda: credit.attribution(mix=1.0),
    "attribution(unsigned)": lambda: credit.attribution(signed=False),
    "shapley(mix=.5, spans of 3)": lambda: credit.shapley(mix=0.5, spans=3),
    "process(keep)": lambda: credit.process(keep=True),
    "length_penalty(ramp)": lambda: credit.length_penalty(coef=1.0, target=2, limit=5),
    "nested": lambda: credit.chain(credit.chain(credit.uniform(mix=0.7), credit.sparse()), credit.kl_penalty()),
}
# they pay by more than the score, whatever the evidence: their sums are hand-computed in tests/math
PAY_MORE = ("length_penalty", "process")
CREDITS: dict[str, Callable[[], Credit]] = {**BUILT_IN, **VARIANTS}
every_credit = pytest.mark.parametrize("make", CREDITS.values(), ids=CREDITS.keys())
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def cases(**strategies: st.SearchStrategy) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorate a check of (make, …): `examples` for each registered credit, a third of them for variants."""

    def decorate(check: Callable[..., None]) -> Callable[..., None]:
        check_few = examples(12)(given(**strategies)(check))
        check_many = examples(36)(given(**strategies)(check))

        def test(make: Callable[[], Credit]) -> None:
            (check_many if make in BUILT_IN.values() else check_few)(make=make)

        test.__name__, test.__doc__ = check.__name__, check.__doc__
        return every_credit(test)

    return decorate


@st.composite
def masks(draw: st.DrawFn) -> Tensor:
    """(B,T) masks with holes, rows without tokens, rows of one token, and T=1."""
    length = draw(st.integers(1, 9))
    row = st.lists(st.booleans(), min_size=length, max_size=length)
    lone = st.integers(0, length - 1).map(lambda i: [j == i for j in range(length)])
    prefix = st.integers(0, length).map(lambda n: [j < n for j in range(length)])
    return torch.tensor(draw(st.lists(st.one_of(row, lone, prefix), min_size=1, max_size=4)), dtype=torch.bool)


def batch(method: Credit, mask: Tensor, seed: int) -> tuple[Rollouts, Tensor]:
    """Return rollouts on `mask`, poisoned off it, and rewards (B,T) of mixed sign; some evidence rows have no mass."""
    rollouts = helpers.rollouts(mask, sorted(method.needs), seed=seed)
    if seed % 3 == 0:
        zero = {
            k: torch.where(mask & (torch.arange(len(mask)) % 2 == 0)[:, None], 0.0, v)
            for k, v in rollouts.evidence.items()
            if "attention" in k or "attribution" in k
        }
        rollouts = rollouts.with_evidence(**zero)
    rewards = torch.randn(mask.shape, generator=torch.Generator().manual_seed(seed + 1))
    return rollouts, helpers.poison(rewards, mask)


def tensors(rollouts: Rollouts) -> dict[str, Tensor]:
    """Return every tensor that the rollouts hold, evidence included, by name."""
    own = {k: v for k, v in vars(rollouts).items() if isinstance(v, Tensor)}
    return own | {f"evidence.{k}": v for k, v in rollouts.evidence.items()}


def assert_near(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


@cases(mask=masks(), seed=st.integers(0, 10_000), dtype=st.sampled_from(DTYPES))
def test_shape_dtype_zeros_and_nothing_mutated(make, mask, seed, dtype):
    method = make()
    rollouts, rewards = batch(method, mask, seed)
    rollouts, rewards = helpers.cast(rollouts, dtype), rewards.to(dtype)
    before = {k: v.clone() for k, v in tensors(rollouts).items()}
    kept, state = rewards.clone(), method.init()
    state_before = {k: v.clone() for k, v in state.items()}
    out, after = method.assign(rollouts, rewards, state)
    assert out.shape == rewards.shape and out.dtype == dtype
    assert (out[~mask] == 0).all(), "something is left off the mask"
    assert torch.isfinite(out).all(), "what stood off the mask leaked in"
    for name, value in tensors(rollouts).items():
        assert torch.equal(value.nan_to_num(7.0), before[name].nan_to_num(7.0)), f"{name} was mutated"
    assert torch.equal(rewards.nan_to_num(7.0), kept.nan_to_num(7.0)), "rewards were mutated"
    assert state.keys() == state_before.keys() == after.keys()
    assert all(torch.equal(state[k], v) and torch.equal(after[k], v) for k, v in state_before.items())


@cases(mask=masks(), seed=st.integers(0, 10_000), dtype=st.sampled_from(DTYPES), least=st.booleans())
def test_finite_for_huge_input(make, mask, seed, dtype, least):
    """Up to 1e30; 1e4 in 16 bit. The bound holds for the row's sum too: α may put all of it on one token."""
    method = make()
    rollouts, rewards = batch(method, mask, seed)
    wide = 1e4 if dtype in (torch.bfloat16, torch.float16) else 1e30
    sizes = {k: v.nan_to_num(0, 0, 0).abs() for k, v in rollouts.evidence.items()}
    # Shapley values are parts of the score, so their sum is bounded as the score is
    peak = {k: (v.sum(dim=-1) if "shapley" in k else v).max() for k, v in sizes.items()}
    big = {k: v * (wide / torch.where(peak[k] > 0, peak[k], 1.0)) for k, v in rollouts.evidence.items()}
    rollouts = replace(rollouts.with_evidence(**big), logprobs=rollouts.logprobs * (wide / 3.0))
    total = torch.where(mask, rewards.abs(), 0).sum(dim=1).max().clamp_min(1e-9)
    rewards = rewards * ((-wide if least else wide) / total)
    out, _ = method.assign(helpers.cast(rollouts, dtype), rewards.to(dtype), method.init())
    assert torch.isfinite(out).all()
    if method.share is not None:
        assert torch.isfinite(method.share(helpers.cast(rollouts, dtype))).all()


@cases(mask=masks(), seed=st.integers(0, 10_000), scale=st.sampled_from((1e-6, 1.0, 1e6, 1e30)))
def test_return_is_kept_and_shares_sum_to_one(make, mask, seed, scale):
    method = make()
    rollouts, rewards = batch(method, mask, seed)
    rewards = rewards * scale
    out, _ = method.assign(rollouts, rewards, method.init())
    on = torch.where(mask, rewards, 0).double()
    drift = (out.double().sum(dim=1) - on.sum(dim=1)).abs()
    if method.keeps_return:
        assert (drift <= 1e-5 * on.abs().sum(dim=1).clamp_min(1.0)).all()
    if method.share is not None:
        share = method.share(rollouts)
        assert share.shape == mask.shape and (share[~mask] == 0).all()
        assert torch.allclose(share.sum(dim=1), mask.any(dim=1).float(), atol=1e-5)
        assert (share >= 0).all(), f"smallest share {share.min()}"


@cases(mask=masks(), seed=st.integers(0, 10_000))
def test_no_row_with_tokens_loses_its_reward(make, mask, seed):
    """Through `apply`: with no gap to the reference and a prompt worth 0, every row's rewards sum to its score."""
    method = make()
    rollouts, _ = batch(method, mask, seed)
    if any(CREDITS[name] is make for name in CREDITS if name.startswith(PAY_MORE)):
        pytest.skip("pays by more than the score")
    alike = {k: rollouts.logprobs for k in method.needs if k.partition("@")[0].endswith("_logprobs")}
    nothing = {k: torch.zeros(len(mask)) for k in method.needs if k == "prompt_score"}
    rollouts = rollouts.with_evidence(**alike, **nothing)
    out, _ = credit.apply(method, rollouts)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out.sum(dim=1), torch.where(mask.any(dim=1), rollouts.scores, 0), rtol=1e-5, atol=1e-5)


@cases(mask=masks(), seed=st.integers(0, 10_000), left=st.integers(0, 3), right=st.integers(0, 3))
def test_padding_rows_and_order_do_not_matter(make, mask, seed, left, right):
    method = make()
    rollouts, rewards = batch(method, mask, seed)
    out, _ = method.assign(rollouts, rewards, method.init())

    wide = torch.nn.functional.pad(rewards, (0, right), value=float("nan"))
    more, _ = method.assign(helpers.padded(rollouts, left, right), wide, method.init())
    assert_near(more[:, : mask.shape[1]], out)
    assert (more[:, mask.shape[1] :] == 0).all()

    single = [torch.tensor([i]) for i in range(len(mask))]
    alone = [method.assign(rollouts.select(i), rewards[i], method.init())[0] for i in single]
    assert_near(torch.cat(alone), out)

    order = torch.randperm(len(mask), generator=torch.Generator().manual_seed(seed))
    assert_near(method.assign(rollouts.select(order), rewards[order], method.init())[0], out[order])


def later_changed(rollouts: Rollouts, rewards: Tensor, cut: int, seed: int) -> tuple[Rollouts, Tensor]:
    """Return a copy whose evidence, log-probs, rewards and mask (so also lengths) differ after token `cut` only.

    Whether anything follows at all stays as it was: that a response ends at a token is known at that token.
    """
    other = helpers.rollouts(rollouts.mask | True, rollouts.evidence, seed=seed + 77, dirty=False)
    generator = torch.Generator().manual_seed(seed + 78)
    after = (torch.arange(rollouts.mask.shape[1]) > cut).expand_as(rollouts.mask)

    def swap(old: Tensor, new: Tensor) -> Tensor:
        return torch.where(after, new, old) if old.shape == after.shape else old

    follows = (rollouts.mask & after).any(dim=1, keepdim=True)
    drawn = torch.rand(after.shape, generator=generator) < 0.5
    drawn[:, -1] |= ~(drawn & after).any(dim=1)  # so that something does where something did
    mask = swap(rollouts.mask, drawn & follows)
    changed = replace(
        rollouts,
        mask=mask,
        valid=mask,
        logprobs=swap(rollouts.logprobs, other.logprobs),
        response_ids=swap(rollouts.response_ids, other.response_ids),
        evidence={k: swap(v, other.evidence[k]) for k, v in rollouts.evidence.items()},
    )
    return changed, swap(rewards, torch.randn(after.shape, generator=generator))


@cases(mask=masks(), seed=st.integers(0, 10_000), cut=st.integers(0, 8))
def test_causal_credits_ignore_what_comes_later(make, mask, seed, cut):
    method = make()
    if not method.causal:
        return
    rollouts, rewards = batch(method, mask, seed)
    out, _ = method.assign(rollouts, rewards, method.init())
    changed, later = later_changed(rollouts, rewards, cut, seed)
    other, _ = method.assign(changed, later, method.init())
    assert torch.equal(out[:, : cut + 1], other[:, : cut + 1])


@every_credit
def test_a_credit_declared_not_causal_has_a_witness(make):
    method = make()
    if method.causal or make is VARIANTS["attention(mix=0)"]:
        pytest.skip("declared causal; or β = 0, which is sparse whatever it declares")
    if any("shapley" in name for name in method.needs):
        pytest.skip("its evidence looks ahead, not its arithmetic: tests/equivalence/test_evidence_reward_games.py")
    mask = helpers.bools([[1, 1, 1, 1, 1]])
    rollouts, rewards = helpers.rollouts(mask, sorted(method.needs), seed=1), torch.ones(1, 5)
    out, _ = method.assign(rollouts, rewards, method.init())
    others = [method.assign(*later_changed(rollouts, rewards, 2, seed), method.init())[0] for seed in range(5)]
    assert any((out[:, :3] - other[:, :3]).abs().max() > 1e-3 for other in others), "declared not causal, no witness"


@cases(mask=masks(), seed=st.integers(0, 10_000))
def test_stats_are_finite_and_their_sums_add_up(make, mask, seed):
    """The sums of the batch equal those of its rows added, as processes and micro-batches add them."""
    method = make()
    if method.stats is None:
        return
    rollouts, rewards = batch(method, mask, seed)
    whole = method.stats(rollouts, rewards, rewards)
    single = [torch.tensor([i]) for i in range(len(mask))]
    rows = [method.stats(rollouts.select(i), rewards[i], rewards[i]) for i in single]
    for name, (total, count) in whole.items():
        assert torch.isfinite(total) and torch.isfinite(count), name
        torch.testing.assert_close(sum(r[name][0] for r in rows), total, rtol=1e-4, atol=1e-4)


def test_metrics_do_not_depend_on_the_number_of_processes():
    """sum / count, which is what a reader sees, is the same whether one process or two held the rows."""
    mask, method = helpers.bools([[1, 1, 1], [1, 1, 0], [1, 0, 0], [0, 0, 0]]), credit.attention()
    rollouts = helpers.rollouts(mask, method.needs, reward_attention=torch.tensor([[1.0, 2, 3], *[[0.0] * 3] * 3]))
    rewards = torch.ones(4, 3)
    whole = method.stats(rollouts, rewards, rewards)
    split = torch.tensor([0, 1]), torch.tensor([2, 3])
    halves = [method.stats(rollouts.select(r), rewards[r], rewards[r]) for r in split]
    for name, (total, count) in whole.items():
        sums, counts = sum(h[name][0] for h in halves), sum(h[name][1] for h in halves)
        torch.testing.assert_close(sums / counts, total / count, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("name", ["attention", "policy_attention"])
def test_zero_mass_becomes_uniform_and_is_counted(name):
    method = credit.find(name)(mix=1.0)
    mask = helpers.bools([[1, 1, 0, 1], [1, 1, 1, 1], [0, 0, 0, 0], [1, 0, 0, 0]])
    (needed,) = method.needs
    mass = torch.tensor([[0.0, 0, 5, 0], [1, 0, 0, 0], [1, 1, 1, 1], [0, 1, 1, 1]])  # none on rows 0 and 3
    rollouts = helpers.rollouts(mask, [needed], dirty=False, scores=torch.tensor([3.0, 2, 9, -4]), **{needed: mass})
    out, _ = credit.apply(method, rollouts)
    assert_near(out, torch.tensor([[1.0, 1, 0, 1], [2, 0, 0, 0], [0, 0, 0, 0], [-4, 0, 0, 0]]))
    counted = method.stats(rollouts, out, out)
    assert counted["credit/fallback_rate"][0] == 2
    assert counted["credit/empty_rate"][0] == 1
