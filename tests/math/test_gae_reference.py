"""GAE against its definition in O(T²), on random masks with holes, random segments and cut-off rows."""

from __future__ import annotations

import helpers
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from apportion import advantages, segments


def by_definition(
    rewards: list[float], values: list[float], after: float, gamma: float, lam: float
) -> tuple[list[float], list[float]]:
    """Return A_k = Σ_l (γλ)^l δ_{k+l} and A_k + V_k of one row of actions, each sum written out, in float64."""
    following = [*values[1:], after][: len(values)]
    delta = [r + gamma * n - v for r, n, v in zip(rewards, following, values, strict=True)]
    count = len(delta)
    adv = [sum((gamma * lam) ** (j - k) * delta[j] for j in range(k, count)) for k in range(count)]
    return adv, [a + v for a, v in zip(adv, values, strict=True)]


def pooled(values: list[float], pooling: str) -> float:
    """Return V of one action from its tokens' values, by the definitions of the four poolings."""
    size = len(values)
    if pooling == "first":
        return values[0]
    if pooling == "last":
        return values[-1]
    weights = [1.0 if pooling == "mean" else 1.0 / (size - i) for i in range(size)]
    return sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights)


FRACTION = st.one_of(st.sampled_from((0.0, 1.0, 0.95)), st.floats(0, 1))


@given(
    seed=st.integers(0, 100_000),
    rows=st.integers(1, 4),
    length=st.integers(1, 12),
    density=st.sampled_from((0.3, 0.7, 1.0)),
    gamma=FRACTION,
    lam=FRACTION,
    pooling=st.sampled_from(("first", "mean", "last", "decayed")),
    macro=st.booleans(),
)
def test_gae_is_its_definition(seed, rows, length, density, gamma, lam, pooling, macro):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(rows, length, generator=generator) < density
    ended = torch.rand(rows, generator=generator) < 0.5
    rollouts = helpers.rollouts(mask, ["values", "bootstrap_values"], seed=seed, ended=ended)
    ids = segments.tokens()(rollouts)
    if macro:  # join random neighbours: an id grows where a coin falls on heads, along the row's tokens
        coin = torch.randint(0, 2, mask.shape, generator=generator) * mask
        first = (mask.cumsum(dim=1) == 1) & mask
        ids = torch.where(mask, (coin * ~first).cumsum(dim=1), -1)
    rewards = helpers.poison(torch.randn(mask.shape, generator=generator), mask)
    out = advantages.gae(gamma, lam, pooling)(rewards, ids, rollouts)
    for i in range(rows):
        actions = [[t for t in range(length) if ids[i, t] == k] for k in range(int(ids[i].max()) + 1)]
        v = [pooled([float(rollouts.evidence["values"][i, t]) for t in tokens], pooling) for tokens in actions]
        r = [sum(float(rewards[i, t]) for t in tokens) for tokens in actions]
        after = 0.0 if ended[i] else float(rollouts.evidence["bootstrap_values"][i])
        adv, ret = by_definition(r, v, after, gamma, lam)
        expected_adv, expected_ret = torch.zeros(length), torch.zeros(length)
        for tokens, a, g in zip(actions, adv, ret, strict=True):
            expected_adv[tokens], expected_ret[tokens] = a, g
        torch.testing.assert_close(out.advantages[i], expected_adv, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(out.returns[i], expected_ret, rtol=1e-4, atol=1e-5)


POOLINGS = ("first", "mean", "last", "decayed", "ma-rlhf-code")
CUTS = (
    segments.tokens(),
    segments.ngrams(3),
    segments.ngrams(3, reproduce="ma-rlhf-code"),
    segments.random_ngrams((1, 2, 4)),
    segments.entropy(1.0),
    segments.turns(),
    segments.whole_response(),
)


@settings(max_examples=200)
@given(
    seed=st.integers(0, 100_000),
    length=st.integers(1, 12),
    lam=FRACTION,
    pooling=st.sampled_from(POOLINGS),
    cut=st.sampled_from(CUTS),
    turns=st.booleans(),
)
def test_macro_gae_over_every_segmenters_ragged_actions_is_its_definition(seed, length, lam, pooling, cut, turns):
    """Rows of one batch are cut in different places; each is as by hand, to 1e-6 of its size in float32."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(4, length, generator=generator) < torch.tensor([[1.0], [0.8], [0.4], [0.1]])
    turn = (torch.rand(mask.shape, generator=generator) < 0.2).cumsum(dim=1) if turns else None
    rollouts = helpers.rollouts(mask, ["values", "entropy"], seed=seed, turn=turn)
    ids = cut(rollouts)
    code = pooling == "ma-rlhf-code"
    estimator = advantages.gae(1.0, lam, "mean" if code else pooling, reproduce=pooling if code else None)
    rewards = helpers.poison(torch.randn(mask.shape, generator=generator), mask)
    out = estimator(rewards, ids, rollouts)
    for i in range(4):
        actions = [(ids[i] == k).nonzero().squeeze(1).tolist() for k in range(int(ids[i].max()) + 1)]
        v = [pooled(rollouts.evidence["values"][i, t].tolist(), "mean" if code else pooling) for t in actions]
        r = [sum(rewards[i, t].tolist()) / (len(t) if code else 1) for t in actions]
        adv, ret = by_definition(r, v, 0.0, 1.0, lam)
        size = max([1.0, *map(abs, r), *map(abs, v), *map(abs, adv)])
        expected = torch.zeros(2, length, dtype=torch.float64)
        for t, a, g in zip(actions, adv, ret, strict=True):
            expected[0, t], expected[1, t] = a, g
        got = torch.stack([out.advantages[i], out.returns[i]]).double()
        assert (got - expected).abs().max() <= 1e-6 * size
