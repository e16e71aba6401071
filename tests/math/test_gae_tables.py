"""GAE by hand: tokens, holes, cut-off rows, and macro actions with each pooling of the values."""

from __future__ import annotations

import helpers
import pytest
import torch
from torch import Tensor

from apportion import advantages, segments
from apportion.errors import ConfigError, DataError

NAN = float("nan")


def run(
    estimator: object,
    rewards: list[float],
    values: list[float],
    mask: list[int] | None = None,
    ids: list[int] | None = None,
    **more: Tensor,
) -> tuple[list[float], list[float]]:
    """Return the advantages and returns of one row; tokens are actions unless segment `ids` are given."""
    on = helpers.bools([mask or [1] * len(rewards)])
    names = ["values", *(["bootstrap_values"] if "bootstrap_values" in more else [])]
    rollouts = helpers.rollouts(on, names, values=torch.tensor([values]), **more)
    cut = segments.tokens()(rollouts) if ids is None else torch.tensor([ids])
    out = estimator(torch.tensor([rewards]), cut, rollouts)
    assert out.advantages.shape == out.returns.shape == on.shape
    return out.advantages[0].tolist(), out.returns[0].tolist()


def check(got: tuple[list[float], list[float]], adv: list[float], ret: list[float]) -> None:
    assert got[0] == pytest.approx(adv, abs=1e-6)
    assert got[1] == pytest.approx(ret, abs=1e-6)


# γ=1, λ=.95: δ = (0+.4−.5, 0+.3−.4, 1−.3) = (−.1, −.1, .7)
# A2 = .7; A1 = −.1 + .95·.7 = .565; A0 = −.1 + .95·.565 = .43675; returns A+V
PLAIN = ([0.43675, 0.565, 0.7], [0.93675, 0.965, 1.0])


def test_text_settings():
    check(run(advantages.gae(), [0, 0, 1.0], [0.5, 0.4, 0.3]), *PLAIN)


def test_discounting():
    # γ=.9, λ=.5, γλ=.45: δ = (1+.9·2−1, 0+.9·3−2, 2−3) = (1.8, .7, −1)
    # A2 = −1; A1 = .7 − .45 = .25; A0 = 1.8 + .1125 = 1.9125
    got = run(advantages.gae(gamma=0.9, lam=0.5), [1.0, 0, 2], [1.0, 2, 3])
    check(got, [1.9125, 0.25, -1], [2.9125, 2.25, 2])


def test_holes_are_stepped_over():
    """The same numbers, from one True to the next, whatever stands in the holes and after the end."""
    got = run(advantages.gae(), [NAN, 0, 9, 0, NAN, 1, NAN], [NAN, 0.5, NAN, 0.4, 7, 0.3, NAN], [0, 1, 0, 1, 0, 1, 0])
    adv, ret = PLAIN
    check(got, [0, adv[0], 0, adv[1], 0, adv[2], 0], [0, ret[0], 0, ret[1], 0, ret[2], 0])


def test_a_row_that_was_cut_off_bootstraps():
    # γ=.9, λ=.5 as above but .9·.5 = .45 more in the last δ: −.55; A1 = .7 − .2475 = .4525; A0 = 1.8 + .203625
    estimator, bootstrap = advantages.gae(gamma=0.9, lam=0.5), torch.tensor([0.5])
    more = {"bootstrap_values": bootstrap, "ended": torch.tensor([False])}
    expected = ([2.003625, 0.4525, -0.55], [3.003625, 2.4525, 2.45])
    check(run(estimator, [1.0, 0, 2], [1.0, 2, 3], **more), *expected)
    # with padding after the cut, and a hole before
    got = run(estimator, [1.0, 5, 0, 2, NAN], [1.0, 5, 2, 3, NAN], [1, 0, 1, 1, 0], **more)
    check(got, *([v[0], 0, v[1], v[2], 0] for v in expected))


@pytest.mark.parametrize("bootstrap", [0.5, NAN])
def test_a_row_that_ended_never_reads_the_bootstrap_value(bootstrap):
    for ended in ({"ended": torch.tensor([True])}, {}):
        got = run(advantages.gae(), [0, 0, 1.0], [0.5, 0.4, 0.3], bootstrap_values=torch.tensor([bootstrap]), **ended)
        check(got, *PLAIN)


# actions {0,1}, {2,3,4}; rewards .1+.2 and 1; δ1 = 1 − V1, δ0 = .3 + V1 − V0, A0 = δ0 + .95·δ1
MACRO = [
    # V = 1, 3: δ1 = −2, δ0 = 2.3, A0 = .4
    ("first", (1.0, 3.0), (0.4, -2.0)),
    # V = 1.5, 4: δ1 = −3, δ0 = 2.8, A0 = −.05
    ("mean", (1.5, 4.0), (-0.05, -3.0)),
    # V = 2, 5: δ1 = −4, δ0 = 3.3, A0 = −.5
    ("last", (2.0, 5.0), (-0.5, -4.0)),
    # weights ∝ ½, 1 → ⅓, ⅔: V0 = 5/3; ⅓, ½, 1 → 2 3 6 of 11: V1 = (6+12+30)/11 = 48/11
    # δ1 = −37/11, δ0 = .3 + 48/11 − 5/3 = 2.996970, A0 = 2.996970 − 3.195455
    ("decayed", (5 / 3, 48 / 11), (-0.198485, -37 / 11)),
]


@pytest.mark.parametrize(("pooling", "values", "adv"), MACRO, ids=[m[0] for m in MACRO])
@pytest.mark.parametrize("hole", [False, True])
def test_macro_actions(pooling, values, adv, hole):
    rewards, tokens, mask, ids = [0.1, 0.2, 0, 0, 1], [1.0, 2, 3, 4, 5], [1] * 5, [0, 0, 1, 1, 1]
    ret = [adv[k] + values[k] for k in ids]
    expected = [adv[k] for k in ids]
    if hole:  # inside action 1, and one column of padding
        for row, junk in ((rewards, NAN), (tokens, NAN), (mask, 0), (ids, -1), (ret, 0.0), (expected, 0.0)):
            row.insert(3, junk)
            row.append(junk)
    check(run(advantages.gae(pooling=pooling), rewards, tokens, mask, ids), expected, ret)


# the released code, n=5 on 7 tokens: actions of 5, 1 and 1 (the last token alone), V and R means with equal weights.
# κ·kl is −.1 on each token, the score 2 on the last: R = (−.1, −.1, 1.9). V = mean(1..5) = 3, 6, 7
# δ2 = 1.9 − 7 = −5.1; δ1 = −.1 + 7 − 6 = .9; δ0 = −.1 + 6 − 3 = 2.9
# A2 = −5.1; A1 = .9 − .95·5.1 = −3.945; A0 = 2.9 − .95·3.945 = −.84775
CODE = ((-0.84775, -3.945, -5.1), (3.0, 6.0, 7.0))
# ours, ngrams(5): actions of 5 and 2, R sums: −.5 and −.1 + 1.9 = 1.8; V = 3, 6.5
# δ1 = 1.8 − 6.5 = −4.7; δ0 = −.5 + 6.5 − 3 = 3; A0 = 3 − .95·4.7 = −1.465
OURS = ((-1.465, -4.7), (3.0, 6.5))


def test_the_released_code_of_ma_rlhf_beside_ours():
    rewards, values = [-0.1] * 6 + [1.9], [1.0, 2, 3, 4, 5, 6, 7]
    rollouts = helpers.rollouts(helpers.bools([[1] * 7]))
    for reproduce, (adv, v) in (("ma-rlhf-code", CODE), (None, OURS)):
        ids = segments.ngrams(reproduce=reproduce)(rollouts)[0].tolist()
        got = run(advantages.gae(pooling="mean", reproduce=reproduce), rewards, values, ids=ids)
        check(got, [adv[k] for k in ids], [adv[k] + v[k] for k in ids])


def test_the_released_codes_mean_reward_loses_what_a_sum_keeps():
    """With the score inside an action of n tokens, 1/n of it is left: hence its rule for the last token."""
    ids = [0, 0, 0, 0]
    code = run(advantages.gae(pooling="mean", reproduce="ma-rlhf-code"), [0, 0, 0, 1.0], [0.0] * 4, ids=ids)
    check(code, [0.25] * 4, [0.25] * 4)
    check(run(advantages.gae(pooling="mean"), [0, 0, 0, 1.0], [0.0] * 4, ids=ids), [1.0] * 4, [1.0] * 4)


@pytest.mark.parametrize("kwargs", [{"reproduce": "paper", "pooling": "mean"}, {"reproduce": "ma-rlhf-code"}])
def test_only_the_codes_own_pooling_is_reproduced(kwargs):
    with pytest.raises(ConfigError, match=r"gae\.reproduce"):
        advantages.gae(**kwargs)


def test_ragged_rows_of_a_batch():
    """Row 0 has three actions, row 1 one, row 2 none: each as alone."""
    mask = helpers.bools([[1, 1, 1], [1, 1, 0], [0, 0, 0]])
    cut = torch.tensor([[0, 1, 2], [0, 0, -1], [-1, -1, -1]])
    values = torch.tensor([[0.5, 0.4, 0.3], [2.0, 9, NAN], [NAN, NAN, NAN]])
    rewards = torch.tensor([[0, 0, 1.0], [1, 2, NAN], [NAN, 1, 1]])
    out = advantages.gae()(rewards, cut, helpers.rollouts(mask, ["values"], values=values))
    expected = torch.tensor([PLAIN[0], [1.0, 1, 0], [0, 0, 0]])
    torch.testing.assert_close(out.advantages, expected)
    torch.testing.assert_close(out.returns, torch.tensor([PLAIN[1], [3.0, 3, 0], [0, 0, 0]]))


@pytest.mark.parametrize("kwargs", [{"gamma": 1.2}, {"lam": -0.1}, {"gamma": NAN}, {"pooling": "frist"}])
def test_settings_outside_their_range_are_refused(kwargs):
    with pytest.raises(ConfigError, match=next(iter(kwargs))):
        advantages.gae(**kwargs)


def test_absent_values_are_named():
    rollouts = helpers.rollouts(helpers.bools([[1, 1]]))
    with pytest.raises(DataError, match="values"):
        advantages.gae()(torch.zeros(1, 2), segments.tokens()(rollouts), rollouts)
