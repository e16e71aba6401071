"""Every credit on a 2×4 example worked out by hand, its settings, and the adaptive KL controller's steps.

Row 0 has four tokens, R = 2. Row 1 has a hole at position 1 (three tokens, the last at position 3), R = −1.
"""

from __future__ import annotations

import helpers
import pytest
import torch
from torch import Tensor

from apportion import credit
from apportion.errors import ApportionError, ConfigError, DataError, ScoreError

MASK = helpers.bools([[1, 1, 1, 1], [1, 0, 1, 1]])
SCORES = torch.tensor([2.0, -1.0])
# over the mask: row 0 sums to 10 (α = .1 .2 .3 .4); row 1 to 4, its 9 stands in the hole (α = ¼ · ¼ ½)
ATTENTION = torch.tensor([[1.0, 2, 3, 4], [1, 9, 1, 2]])
LOGPROBS = torch.tensor([[-1.0, -2, -3, -4], [-1, -9, -1, -1]])
REFERENCE = torch.tensor([[-1.0, -3, -2, -4], [-2, 0, -1, -0.5]])  # log-ratios 0 1 −1 0 and 1 · 0 −.5
NAMES = ("reward_attention", "policy_attention_mean", "policy_attention_last", "reference_logprobs")


def example(**changed: Tensor):
    given = dict.fromkeys(NAMES, ATTENTION) | {"reference_logprobs": REFERENCE, "logprobs": LOGPROBS, "scores": SCORES}
    return helpers.rollouts(MASK, NAMES, **(given | changed))


def rewards(method: credit.Credit) -> Tensor:
    return credit.apply(method, example())[0]


def assert_equal(got: Tensor, expected: list[list[float]]) -> None:
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float32), rtol=1e-5, atol=1e-6)


TABLE = [
    ("sparse", credit.sparse(), [[0, 0, 0, 2], [0, 0, 0, -1]]),
    ("uniform", credit.uniform(), [[0.5, 0.5, 0.5, 0.5], [-1 / 3, 0, -1 / 3, -1 / 3]]),
    # β = .6: 1.2/4 = .3 each, .4·2 = .8 more on the last; −.6/3 = −.2 each, −.4 more on the last
    ("uniform .6", credit.uniform(mix=0.6), [[0.3, 0.3, 0.3, 1.1], [-0.2, 0, -0.2, -0.6]]),
    # β = .8 (the default): 1.6·α and .2·2 = .4 more on the last; −.8·α and −.2 more on the last
    ("attention", credit.attention(), [[0.16, 0.32, 0.48, 1.04], [-0.2, 0, -0.2, -0.6]]),
    ("attention 1", credit.attention(mix=1.0), [[0.2, 0.4, 0.6, 0.8], [-0.25, 0, -0.25, -0.5]]),
    # half of α, half of ¼ (row 1: of ⅓): .175 .225 .275 .325; 7/24 · 7/24 10/24
    (
        "floor .5",
        credit.attention(mix=1.0, floor=0.5),
        [[0.35, 0.45, 0.55, 0.65], [-7 / 24, 0, -7 / 24, -10 / 24]],
    ),
    # row 0: .4 → .35, the other .65 as 1:2:3 of 6. Row 1: ½ → .35, the others .325 each
    (
        "cap .35",
        credit.attention(mix=1.0, cap=0.35),
        [[2 * 0.65 / 6, 2 * 1.3 / 6, 2 * 1.95 / 6, 0.7], [-0.325, 0, -0.325, -0.35]],
    ),
    # row 0: .4 and .3 at .3, the other .4 as 1:2. Row 1: three tokens cannot stay under .3, so a third each
    ("cap .3", credit.attention(mix=1.0, cap=0.3), [[0.8 / 3, 1.6 / 3, 0.6, 0.6], [-1 / 3, 0, -1 / 3, -1 / 3]]),
    # the last token's 4 (row 1: its 2) is left out: 1 2 3 of 6; 1 · 1 of 2
    ("exclude self", credit.attention(mix=1.0, exclude_self=True), [[1 / 3, 2 / 3, 1, 0], [-0.5, 0, -0.5, 0]]),
    ("policy mean", credit.policy_attention(), [[0.16, 0.32, 0.48, 1.04], [-0.2, 0, -0.2, -0.6]]),
    ("policy last", credit.policy_attention(view="last", mix=1.0), [[0.2, 0.4, 0.6, 0.8], [-0.25, 0, -0.25, -0.5]]),
    # κ = .05: 0 −.05 .05 2; −.05 · 0 −1 + .025
    ("kl", credit.kl_penalty(), [[0, -0.05, 0.05, 2], [-0.05, 0, 0, -0.975]]),
    # redistribution first, then κ = .1 a token, not redistributed
    (
        "abc",
        credit.chain(credit.attention(), credit.kl_penalty(coef=0.1)),
        [[0.16, 0.22, 0.58, 1.04], [-0.3, 0, -0.2, -0.55]],
    ),
    # on purpose the other way round: Σ row 0 = 2 − 0 = 2; Σ row 1 = −1 − .1·.5 = −1.05
    (
        "kl, then spread",
        credit.chain(credit.kl_penalty(coef=0.1), credit.uniform(), allow_redistributing_penalties=True),
        [[0.5, 0.5, 0.5, 0.5], [-0.35, 0, -0.35, -0.35]],
    ),
]


@pytest.mark.parametrize(("method", "expected"), [t[1:] for t in TABLE], ids=[t[0] for t in TABLE])
def test_table(method, expected):
    assert_equal(rewards(method), expected)


def test_shifted_policy_attention_gives_the_first_token_nothing():
    # means over 4 and 3 steps, of which 3 2 1 0 and 2 1 0 see a token: row 0: 4/3 4 12 · → · 4/3 4 12 of 52/3;
    # row 1: 3/2 3 · → · 3/2 3 of 9/2. No step sees the last token, so nothing of it is left
    mask = helpers.bools([[1, 1, 1, 1], [1, 1, 1, 0]])
    mass = torch.tensor([[1.0, 2, 3, 4], [1, 1, 1, 0]])
    rollouts = helpers.rollouts(mask, ["policy_attention_mean"], policy_attention_mean=mass, scores=SCORES)
    out, _ = credit.apply(credit.policy_attention(mix=1.0, shifted=True), rollouts)
    assert_equal(out, [[0, 2 / 13, 6 / 13, 18 / 13], [0, -1 / 3, -2 / 3, 0]])


def test_share_statistics_by_hand():
    stats = credit.attention().stats(example(), MASK.float(), MASK.float())
    # kept mass 10 and 4; largest shares .4 and .5; entropy of (.1 .2 .3 .4) is 1.279854, of (¼ ¼ ½) 1.039721
    for name, expected in (
        ("kept_mass", 14.0),
        ("max_share", 0.9),
        ("share_entropy", 2.319575),
        ("fallback_rate", 0.0),
    ):
        torch.testing.assert_close(stats[f"credit/{name}"][0], torch.tensor(expected))
    assert stats["credit/kept_mass"][1] == 2
    kl = credit.kl_penalty().stats(example(), MASK.float(), MASK.float())["objective/kl"]
    assert kl[0] == 0.5 and kl[1] == 2  # nats over both rows (0 + .5), rows


@pytest.mark.parametrize(
    ("nats", "rows", "expected"),
    [
        # κ·(1 + clip(kl/6 − 1, ±.2)·n/10000), κ = .2
        (12.0 * 256, 256.0, 0.201024),  # kl 12, twice the target: +.2 · .0256 = +.00512
        (5.4 * 256, 256.0, 0.199488),  # kl 5.4: −.1 · .0256 = −.00256
        (0.0, 256.0, 0.198976),  # −1 clipped to −.2
        (-50.0, 16.0, 0.199936),  # k1 can be negative: −.2 · .0016
        (6.0 * 8, 8.0, 0.2),  # on target
        (0.0, 0.0, 0.2),  # no rows with tokens
    ],
)
def test_adaptive_controller_steps(nats, rows, expected):
    method = credit.kl_penalty(coef=0.2, target=6.0)
    before = method.init()
    after = method.update(before, {"objective/kl": (torch.tensor(nats), torch.tensor(rows))})
    torch.testing.assert_close(after["coef"], torch.tensor(expected), rtol=1e-6, atol=0)
    assert before["coef"] == torch.tensor(0.2), "the state that came was changed"


def test_the_state_is_what_penalises_and_assign_never_moves_it():
    method = credit.chain(credit.sparse(), credit.kl_penalty(coef=0.2, target=0.05, horizon=2))
    state = method.init()
    first, same = credit.apply(method, example(), state)
    assert set(state) == set(same) and all(torch.equal(state[k], same[k]) for k in state)
    # kl a row = .25, five times the target: κ·(1 + .2·2/2) = .24
    moved = method.update(state, method.stats(example(), first, first))
    assert_equal(credit.apply(method, example(), moved)[0], [[0, -0.24, 0.24, 2], [-0.24, 0, 0, -0.88]])


def test_a_fixed_coefficient_stays():
    method = credit.kl_penalty(coef=0.2)
    after = method.update(method.init(), {"objective/kl": (torch.tensor(1e6), torch.tensor(4.0))})
    assert torch.equal(after["coef"], method.init()["coef"])


def test_a_redistributor_after_a_penalty_is_refused():
    for spread in (credit.uniform(), credit.attention(), credit.chain(credit.sparse(), credit.policy_attention())):
        with pytest.raises(ConfigError, match="allow_redistributing_penalties"):
            credit.chain(credit.kl_penalty(), spread)
        with pytest.raises(ConfigError):
            credit.chain(credit.chain(credit.sparse(), credit.kl_penalty()), spread)
        with pytest.raises(ConfigError):
            credit.chain(credit.kl_penalty(), credit.sparse(), spread)
    assert not credit.chain(credit.uniform(), credit.kl_penalty()).keeps_return
    with pytest.raises(ConfigError):
        credit.chain()


@pytest.mark.parametrize("bad", [-0.1, 1.1, float("nan"), "0.5", True])
def test_fractions_outside_their_range_are_refused(bad):
    for make in (credit.uniform, credit.attention, credit.policy_attention):
        with pytest.raises(ConfigError, match="mix"):
            make(mix=bad)
    for name in ("floor", "cap"):
        with pytest.raises(ConfigError, match=name):
            credit.attention(**{name: bad})


@pytest.mark.parametrize("kwargs", [{"coef": -1.0}, {"coef": float("nan")}, {"target": 0.0}, {"horizon": 0}])
def test_penalty_settings_outside_their_range_are_refused(kwargs):
    with pytest.raises(ConfigError, match=next(iter(kwargs))):
        credit.kl_penalty(**kwargs)


def test_wrong_evidence_and_scores_are_errors_that_name_the_rollout():
    poor = torch.where(MASK, ATTENTION, 0)
    for value, text in ((float("nan"), "rollout 1"), (float("inf"), "rollout 1"), (-1.0, "rollout 1")):
        bad = poor.clone()
        bad[1, 2] = value
        with pytest.raises(DataError, match=text):
            credit.apply(credit.attention(), example(reward_attention=bad))
    for value in (float("nan"), float("-inf")):
        with pytest.raises(ScoreError, match="rollout 1"):
            credit.apply(credit.sparse(), example(scores=torch.tensor([1.0, value])))
    bare = helpers.rollouts(MASK)
    for method in (credit.attention(), credit.policy_attention(), credit.kl_penalty()):
        (needed,) = method.needs
        with pytest.raises(DataError, match=needed):
            credit.apply(method, bare)
    with pytest.raises(DataError, match="scores"):
        credit.apply(credit.sparse(), helpers.rollouts(MASK, scores=None))
    with pytest.raises(ApportionError, match="log-ratio of rollout 0"):
        credit.apply(credit.kl_penalty(), example(logprobs=torch.full((2, 4), float("-inf"))))
