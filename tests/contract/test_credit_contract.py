"""Every credit method and some chains against the contract of `apportion.testing`, on generated batches."""

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
from apportion.registry import EvidenceKey
from apportion.testing import CLAUSES, DTYPES, Case, later_changed, violation

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


def cases(**strategies: st.SearchStrategy) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorate a check of (make, …): `examples` for each registered credit, a third of them for variants."""

    def decorate(check: Callable[..., None]) -> Callable[..., None]:
        check_few = examples(8)(given(**strategies)(check))
        check_many = examples(24)(given(**strategies)(check))

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


def assert_near(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


@cases(mask=masks(), seed=st.integers(0, 10_000))
def test_every_clause_of_the_contract(make, mask, seed):
    method, case = make(), Case(*batch(make(), mask, seed))
    for clause in CLAUSES:
        message = violation(clause, method, case)
        assert message is None, f"{clause}: {message}"


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


@cases(mask=masks(), seed=st.integers(0, 10_000))
def test_no_row_with_tokens_loses_its_reward(make, mask, seed):
    """Through `apply`: with no gap to the reference and a prompt worth 0, every row's rewards sum to its score."""
    method = make()
    rollouts, _ = batch(method, mask, seed)
    if any(CREDITS[name] is make for name in CREDITS if name.startswith(PAY_MORE)):
        pytest.skip("pays by more than the score")
    alike = {k: rollouts.logprobs for k in method.needs if EvidenceKey.of(k).name.endswith("_logprobs")}
    nothing = {k: torch.zeros(len(mask)) for k in method.needs if k == "prompt_score"}
    rollouts = rollouts.with_evidence(**alike, **nothing)
    out, _ = credit.apply(method, rollouts)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out.sum(dim=1), torch.where(mask.any(dim=1), rollouts.scores, 0), rtol=1e-5, atol=1e-5)


@every_credit
def test_a_credit_declared_not_causal_has_a_witness(make):
    method = make()
    if method.causal or make is VARIANTS["attention(mix=0)"]:
        pytest.skip("declared causal; or β = 0, which is sparse whatever it declares")
    if any("shapley" in name for name in method.needs):
        pytest.skip("its evidence looks ahead, not its arithmetic: tests/equivalence/test_evidence_reward_games.py")
    mask = helpers.bools([[1, 1, 1, 1, 1]])
    case = Case(helpers.rollouts(mask, sorted(method.needs), seed=1), torch.ones(1, 5))
    out, _ = method.assign(*case, method.init())
    others = [method.assign(*later_changed(case, 2, seed), method.init())[0] for seed in range(5)]
    assert any((out[:, :3] - other[:, :3]).abs().max() > 1e-3 for other in others), "declared not causal, no witness"


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
