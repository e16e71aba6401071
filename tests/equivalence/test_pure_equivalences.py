"""Equal methods: limits of credits, chains, GAE and segments that recover a known method."""

from __future__ import annotations

import helpers
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from apportion import Credit, Rollouts, advantages, credit, segments

KEEPING = {name: make for name in credit.names() if (make := credit.find(name))().keeps_return}
every_keeping = pytest.mark.parametrize("make", KEEPING.values(), ids=KEEPING.keys())
SEEDS = st.integers(0, 10_000)


def example(seed: int, *methods: Credit, **given_evidence: Tensor) -> Rollouts:
    """Return rollouts with holes, an empty row and what the methods need, values included."""
    mask = torch.rand(5, 8, generator=torch.Generator().manual_seed(seed)) < 0.7
    mask[4] = False
    names = {"values"}.union(given_evidence, *(m.needs for m in methods))
    return helpers.rollouts(mask, sorted(names), seed=seed, **given_evidence)


def dense(rollouts: Rollouts, seed: int) -> Tensor:
    noise = torch.randn(rollouts.mask.shape, generator=torch.Generator().manual_seed(seed))
    return helpers.poison(noise, rollouts.mask)


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a, b)


@given(seed=SEEDS)
def test_no_mix_is_sparse_bit_for_bit(seed):
    spread = credit.attention(mix=0.0, floor=0.1, cap=0.5), credit.uniform(mix=0.0), credit.policy_attention(mix=0.0)
    for method in spread:
        rollouts = example(seed, method)
        assert same_bits(credit.apply(method, rollouts)[0], credit.apply(credit.sparse(), rollouts)[0])
        for rewards in (
            dense(rollouts, seed),
            dense(rollouts, seed).double() / 3,
        ):  # float64 must not go through float32
            expected = credit.sparse().assign(rollouts, rewards, {})[0]
            assert same_bits(method.assign(rollouts, rewards, {})[0], expected)


@pytest.mark.parametrize("mix", [0.0, 0.3, 0.8, 1.0])
@given(seed=SEEDS, level=st.sampled_from((1e-9, 0.125, 1.0, 1e30)))
def test_constant_attention_is_uniform(mix, seed, level):
    flat = {n: torch.full((5, 8), level) for n in ("reward_attention", "policy_attention_mean")}
    rollouts = example(seed, **flat)
    expected, _ = credit.apply(credit.uniform(mix=mix), rollouts)
    limited = credit.attention(mix=mix, floor=0.4, cap=0.2)
    for method in (credit.attention(mix=mix), limited, credit.policy_attention(mix=mix)):
        torch.testing.assert_close(credit.apply(method, rollouts)[0], expected, rtol=1e-5, atol=1e-6)


def test_uniform_is_the_score_over_the_number_of_tokens():
    rollouts = example(3)
    count = rollouts.mask.sum(dim=1, keepdim=True).clamp_min(1)
    expected = torch.where(rollouts.mask, rollouts.scores[:, None] / count, 0)
    torch.testing.assert_close(credit.apply(credit.uniform(), rollouts)[0], expected)


@pytest.mark.parametrize("name", credit.names())
@given(seed=SEEDS)
def test_sparse_is_the_identity_of_chain(name, seed):
    alone = credit.find(name)()
    rollouts = example(seed, alone)
    rewards = dense(rollouts, seed)
    expected, _ = alone.assign(rollouts, rewards, alone.init())
    for method in (credit.chain(alone, credit.sparse()), credit.chain(credit.sparse(), alone), credit.chain(alone)):
        assert same_bits(method.assign(rollouts, rewards, method.init())[0], expected)
        assert (method.needs, method.keeps_return, method.causal) == (alone.needs, alone.keeps_return, alone.causal)
        assert (method.share is None) == (alone.share is None)
        sums = alone.stats(rollouts, rewards, expected) if alone.stats else {}
        assert method.stats(rollouts, rewards, expected) == sums


@given(seed=SEEDS)
def test_chain_goes_from_left_to_right_and_is_associative(seed):
    a, b, c = credit.attention(mix=0.5), credit.uniform(mix=0.25), credit.kl_penalty(coef=0.3)
    rollouts = example(seed, a, b, c)
    rewards = dense(rollouts, seed)
    by_hand = rewards
    for one in (a, b, c):
        by_hand, _ = one.assign(rollouts, by_hand, one.init())
    for method in (credit.chain(a, b, c), credit.chain(a, credit.chain(b, c)), credit.chain(credit.chain(a, b), c)):
        assert same_bits(method.assign(rollouts, rewards, method.init())[0], by_hand)


def test_a_chain_keeps_the_states_of_equal_methods_apart():
    a, b = credit.kl_penalty(coef=0.1), credit.kl_penalty(coef=0.2, target=1e-3, horizon=1)
    both = credit.chain(credit.sparse(), a, credit.chain(b, credit.sparse()))
    rollouts = example(0, a)
    state = both.init()
    assert sorted(v.item() for v in state.values()) == pytest.approx([0.1, 0.2])
    rewards, _ = credit.apply(both, rollouts, state)
    moved = both.update(state, both.stats(rollouts, rewards, rewards))
    changed = [k for k in state if not torch.equal(state[k], moved[k])]
    assert set(state) == set(moved) and len(changed) == 1, "only the adaptive one moves"
    assert state[changed[0]] == torch.tensor(0.2)
    assert isinstance(state, dict) and all(isinstance(v, Tensor) for v in state.values()), "safetensors holds these"


def reward_to_go(rewards: Tensor, mask: Tensor) -> Tensor:
    kept = torch.where(mask, rewards, 0)
    return torch.where(mask, kept.flip(1).cumsum(1).flip(1), 0)


@given(seed=SEEDS)
def test_lambda_one_is_monte_carlo_and_zero_is_one_step(seed):
    rollouts = example(seed)
    mask, rewards = rollouts.mask, dense(rollouts, seed)
    values = torch.where(mask, rollouts.evidence["values"], 0)
    ids = segments.tokens()(rollouts)
    far = advantages.gae(lam=1.0)(rewards, ids, rollouts)
    to_go = reward_to_go(rewards, mask)
    torch.testing.assert_close(far.returns, to_go, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(far.advantages, torch.where(mask, to_go - values, 0), rtol=1e-4, atol=1e-5)
    near = advantages.gae(gamma=0.9, lam=0.0)(rewards, ids, rollouts).advantages
    for i in range(len(mask)):
        on = mask[i].nonzero().squeeze(1).tolist()
        for here, there in zip(on, [*on[1:], None][: len(on)], strict=True):
            after = 0.0 if there is None else 0.9 * float(values[i, there])
            assert float(near[i, here]) == pytest.approx(float(rewards[i, here] + after - values[i, here]), abs=1e-5)
    assert (near[~mask] == 0).all() and (far.returns[~mask] == 0).all()


@pytest.mark.parametrize("lam", [0.0, 0.5, 1.0])
@given(seed=SEEDS)
def test_one_segment_a_row_is_the_bandit(lam, seed):
    """A = Σr − V(first token), whatever λ: there is nothing to bootstrap from."""
    rollouts = example(seed)
    mask, rewards = rollouts.mask, dense(rollouts, seed)
    out = advantages.gae(gamma=0.7, lam=lam)(rewards, torch.where(mask, 0, -1), rollouts)
    total = torch.where(mask, rewards, 0).sum(dim=1, keepdim=True)
    start = rollouts.evidence["values"].gather(1, mask.int().argmax(dim=1, keepdim=True))
    torch.testing.assert_close(out.returns, torch.where(mask, total, 0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(out.advantages, torch.where(mask, total - start, 0), rtol=1e-4, atol=1e-5)


@given(seed=SEEDS)
def test_poolings_agree_on_actions_of_one_token(seed):
    rollouts = example(seed)
    rewards, ids = dense(rollouts, seed), segments.tokens()(rollouts)
    first = advantages.gae()(rewards, ids, rollouts)
    for pooling in ("mean", "last", "decayed"):
        other = advantages.gae(pooling=pooling)(rewards, ids, rollouts)
        assert same_bits(first.advantages, other.advantages) and same_bits(first.returns, other.returns)


@given(seed=SEEDS)
def test_holes_and_padding_do_not_change_gae(seed):
    """The tokens of each row moved together give the same numbers."""
    rollouts = example(seed)
    mask, rewards, values = rollouts.mask, dense(rollouts, seed), rollouts.evidence["values"]
    order = mask.int().sort(dim=1, descending=True, stable=True).indices
    packed = helpers.rollouts(mask.gather(1, order), ["values"], values=values.gather(1, order))
    a = advantages.gae()(rewards, segments.tokens()(rollouts), rollouts)
    b = advantages.gae()(rewards.gather(1, order), segments.tokens()(packed), packed)
    assert same_bits(a.advantages.gather(1, order), b.advantages) and same_bits(a.returns.gather(1, order), b.returns)


@every_keeping
@given(seed=SEEDS)
def test_a_credit_that_keeps_the_return_keeps_the_first_tokens_return(make, seed):
    """γ=1, λ=1, V=0: the first token's return is the score, wherever the credit put it."""
    method = make()
    rollouts = example(seed, method, values=torch.zeros(5, 8))
    rewards, _ = credit.apply(method, rollouts)
    out = advantages.gae(lam=1.0)(rewards, segments.tokens()(rollouts), rollouts)
    first = out.returns.gather(1, rollouts.mask.int().argmax(dim=1, keepdim=True)).squeeze(1)
    torch.testing.assert_close(first, torch.where(rollouts.mask.any(dim=1), rollouts.scores, 0), rtol=1e-4, atol=1e-5)
