"""GAE against its definition in O(T²), on random masks with holes, random segments and cut-off rows."""

from __future__ import annotations

import helpers
import torch
from hypothesis import given
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
