"""The credits that are neither attention nor a plain spread, on examples worked out by hand, and what they equal."""

from __future__ import annotations

import helpers
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from apportion import advantages, credit, segments
from apportion.errors import ConfigError, DataError
from apportion.masking import previous

# row 0: four tokens, R = 2; row 1: a hole at 1, R = −1; row 2: one token, R = 3; row 3: none
MASK = helpers.bools([[1, 1, 1, 1], [1, 0, 1, 1], [0, 1, 0, 0], [0, 0, 0, 0]])
SCORES = torch.tensor([2.0, -1.0, 3.0, 9.0])


def apply(method: credit.Credit, **given: Tensor) -> Tensor:
    """Return the rewards of `method` from SCORES on MASK; everything off the mask is NaN or infinite."""
    return credit.apply(method, helpers.rollouts(MASK, [*given], scores=SCORES, **given))[0]


def assert_equal(got: Tensor, expected: list[list[float]]) -> None:
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float32), rtol=1e-5, atol=1e-6)


# after tokens 0..3; the last entries are the scores, as the reward model gives them
PREFIXES = torch.tensor([[0.5, 1.5, 1.0, 2.0], [1.0, 50, -2.0, -1.0], [7, 3.0, 7, 7], [7, 7, 7, 7]])
PROMPT = torch.tensor([0.2, -0.4, 1.0, 5.0])


class TestPrefixDifference:
    @pytest.mark.parametrize(
        ("settings", "expected"),
        [
            # differences 0.5 − 0 (the prompt's part stays), 1, −.5, 1; row 1 skips its hole: 1, −3, 1
            ({}, [[0.5, 1, -0.5, 1], [1, 0, -3, 1], [0, 3, 0, 0], [0] * 4]),
            # the prompt's .2, −.4 and 1 are left out: of the first token
            ({"initial": "omit"}, [[0.3, 1, -0.5, 1], [1.4, 0, -3, 1], [0, 2, 0, 0], [0] * 4]),
            # half of each, and half of the score on the last
            ({"mix": 0.5}, [[0.25, 0.5, -0.25, 1.5], [0.5, 0, -1.5, 0], [0, 3, 0, 0], [0] * 4]),
            ({"mix": 0.0}, [[0, 0, 0, 2], [0, 0, 0, -1], [0, 3, 0, 0], [0] * 4]),
        ],
    )
    def test_table(self, settings: dict, expected: list[list[float]]) -> None:
        assert_equal(apply(credit.prefix_difference(**settings), prefix_scores=PREFIXES, prompt_score=PROMPT), expected)

    def test_what_the_score_has_beyond_the_models_own_stays_on_the_last_token(self) -> None:
        """A clipped score (2 instead of 5, say): the sum is kept, and no other token changes."""
        higher = PREFIXES.clone()
        higher[0, 3], higher[1, 3] = 5.0, -8.0
        assert_equal(
            apply(credit.prefix_difference(), prefix_scores=higher),
            [[0.5, 1, -0.5, 1], [1, 0, -3, 1], [0, 3, 0, 0], [0] * 4],
        )

    def test_a_penalty_that_is_already_there_stays_where_it_is(self) -> None:
        reference = torch.tensor([[-1.0, -3, -2, -4], [-2, 0, -1, -0.5], [-1] * 4, [-1] * 4])
        logprobs = torch.tensor([[-1.0, -2, -3, -4], [-1, -9, -1, -1], [-1] * 4, [-1] * 4])
        given = {"reference_logprobs": reference, "prefix_scores": PREFIXES}
        rollouts = helpers.rollouts(MASK, given, scores=SCORES, logprobs=logprobs, **given)
        penalty, shaped = credit.kl_penalty(coef=0.1), credit.prefix_difference()
        one = credit.apply(credit.chain(penalty, shaped, allow_redistributing_penalties=True), rollouts)[0]
        torch.testing.assert_close(one, credit.apply(credit.chain(shaped, penalty), rollouts)[0])
        assert_equal(one, [[0.5, 0.9, -0.4, 1], [0.9, 0, -3, 1.05], [0, 3, 0, 0], [0] * 4])

    def test_metrics(self) -> None:
        """Row 0 moves by 1, .5, 1; row 1 by 3, 1. The rewards came to 2, −1, 3: row 0's prefix says .5 more."""
        prefixes = PREFIXES.clone()
        prefixes[0, 3] = 2.5
        rollouts = helpers.rollouts(MASK, ["prefix_scores"], scores=SCORES, prefix_scores=prefixes)
        rewards = credit.apply(credit.sparse(), rollouts)[0]
        found = credit.prefix_difference().stats(rollouts, rewards, rewards)
        assert [v.item() for v in found["credit/prefix_move"]] == [1 + 0.5 + 1.5 + 3 + 1, 8]
        assert [v.item() for v in found["credit/prefix_gap"]] == [0.5, 3]

    def test_bad_input_is_named(self) -> None:
        with pytest.raises(ConfigError, match=r"prefix_difference.initial: got 'last'; expected one of first, omit"):
            credit.prefix_difference(initial="last")
        with pytest.raises(ConfigError, match=r"prefix_difference.mix: got 1.5"):
            credit.prefix_difference(mix=1.5)
        with pytest.raises(DataError, match=r"evidence\['prefix_scores'\]: got 'no evidence'"):
            apply(credit.prefix_difference())
        wrong = torch.where(MASK, PREFIXES, 0.0)
        wrong[1, 2] = torch.nan
        with pytest.raises(DataError, match=r"evidence\['prefix_scores'\] of rollout 1, token 2: got nan"):
            apply(credit.prefix_difference(), prefix_scores=wrong)
        with pytest.raises(DataError, match=r"evidence\['prompt_score'\]: got \(4, 4\); expected shape \(4,\)"):
            apply(credit.prefix_difference(initial="omit"), prefix_scores=PREFIXES, prompt_score=PREFIXES)


@settings(max_examples=100)
@given(seed=st.integers(0, 10_000), lam=st.sampled_from((0.0, 0.5, 0.95, 1.0)), omit=st.booleans())
def test_gae_of_a_potential_with_the_critic_less_the_potential_is_gae_of_the_sparse_score(seed, lam, omit) -> None:
    """GAE(prefix difference, V−Φ) = GAE(sparse, V) at γ=1, for any V and Φ, ragged masks with holes, and any λ.

    Φ is 0 after the end and, when the prompt's own score is put on the first token, before the first as well.
    """
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(5, 7, generator=generator) < 0.7
    given = {n: 0.25 * torch.randn(5, 7, generator=generator) for n in ("prefix_scores", "values")}
    prompt = 0.25 * torch.randn(5, generator=generator)
    rollouts = helpers.rollouts(mask, [*given, "prompt_score"], seed=seed, dirty=False, prompt_score=prompt, **given)
    start = prompt[:, None] if omit else 0.0
    below = rollouts.with_evidence(values=given["values"] - previous(given["prefix_scores"], mask, start))
    estimate, ids = advantages.gae(lam=lam), segments.tokens()(rollouts)
    shaped = credit.prefix_difference(initial="omit" if omit else "first")
    one = estimate(credit.apply(shaped, below)[0], ids, below).advantages
    other = estimate(credit.apply(credit.sparse(), rollouts)[0], ids, rollouts).advantages
    torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


# log-ratios DPO − reference: .4 −2 0 1; 3 · −.4 .2; 0.5
DPO = torch.tensor([[-1.0, -3, -2, -1], [-1, 0, -1.4, -0.8], [0, -1, 0, 0], [0] * 4])
REFERENCE = torch.tensor([[-1.4, -1, -2, -2], [-4, 0, -1, -1], [0, -1.5, 0, 0], [0] * 4])


class TestImplicit:
    @pytest.mark.parametrize(
        ("settings", "expected"),
        [
            # β₁ = .05: .02, −.1 → −.05, 0, .05; .15 → .05 · −.02 .01; .025
            ({}, [[0.02, -0.05, 0, 2.05], [0.05, 0, -0.02, -0.99], [0, 3.025, 0, 0], [0] * 4]),
            ({"coef": 0.1, "clip": None}, [[0.04, -0.2, 0, 2.1], [0.3, 0, -0.04, -0.98], [0, 3.05, 0, 0], [0] * 4]),
            ({"coef": 0.0}, [[0, 0, 0, 2], [0, 0, 0, -1], [0, 3, 0, 0], [0] * 4]),
        ],
    )
    def test_table(self, settings: dict, expected: list[list[float]]) -> None:
        assert_equal(apply(credit.implicit(**settings), implicit_logprobs=DPO, reference_logprobs=REFERENCE), expected)

    def test_metrics(self) -> None:
        given = {"implicit_logprobs": DPO, "reference_logprobs": REFERENCE}
        rollouts = helpers.rollouts(MASK, given, **given)
        found = credit.implicit().stats(rollouts, SCORES, SCORES)
        assert found["credit/implicit"][0].item() == pytest.approx(0.02 - 0.05 + 0.05 + 0.05 - 0.02 + 0.01 + 0.025)
        assert [v.item() for v in found["credit/implicit_clipfrac"]] == [2, 8] and found["credit/implicit"][1] == 3

    def test_its_model_is_required_and_bad_settings_are_named(self) -> None:
        needs = credit.implicit(model="runs/dpo").needs
        assert needs == {'implicit_logprobs@model="runs/dpo"', "reference_logprobs"}
        for name, value in (("coef", -1.0), ("clip", 0.0), ("clip", float("nan")), ("model", " "), ("model", 3)):
            with pytest.raises(ConfigError, match=f"implicit.{name}: got"):
                credit.implicit(**{name: value})


class TestProcess:
    def test_replaces_or_adds(self) -> None:
        given = torch.tensor([[0.5, 0, -1, 2], [1, 9, 0, -0.25], [9, 0.5, 9, 9], [9] * 4])
        replaced = [[0.5, 0, -1, 2], [1, 0, 0, -0.25], [0, 0.5, 0, 0], [0] * 4]
        assert_equal(apply(credit.process(), process_rewards=given), replaced)
        added = [[0.5, 0, -1, 4], [1, 0, 0, -1.25], [0, 3.5, 0, 0], [0] * 4]
        assert_equal(apply(credit.process(keep=True), process_rewards=given), added)

    def test_settings(self) -> None:
        assert not credit.process(causal=False).causal
        settings = 'process_rewards@function="operator:itemgetter";unit="step"'
        assert credit.process(function="operator:itemgetter", unit="step").needs == {settings}
        with pytest.raises(ConfigError, match=r"process.unit: got 'word'; expected one of step, token"):
            credit.process(unit="word")
        with pytest.raises(ConfigError, match=r"process.keep: got 'yes'"):
            credit.process(keep="yes")
        with pytest.raises(ConfigError, match=r"process.function: got 'nowhere:f'.*No module named 'nowhere'"):
            credit.process(function="nowhere:f")


class TestLengthPenalty:
    @pytest.mark.parametrize(
        ("settings", "costs"),
        [
            ({}, [0.04, 0.03, 0.01]),  # a hundredth for each of 4, 3 and 1 tokens
            ({"coef": 0.5, "target": 2}, [1.0, 0.5, 0.0]),
            # DAPO with L_max 4 and L_cache 3: (n − 1)/3, so 1, 2/3, 0
            ({"coef": 1.0, "target": 1, "limit": 4}, [1.0, 2 / 3, 0.0]),
            ({"coef": 2.0, "target": 1, "limit": 3}, [2.0, 2.0, 0.0]),  # full from the limit on
        ],
    )
    def test_table(self, settings: dict, costs: list[float]) -> None:
        a, b, c = (s - cost for s, cost in zip((2, -1, 3), costs, strict=True))
        assert_equal(apply(credit.length_penalty(**settings)), [[0, 0, 0, a], [0, 0, 0, b], [0, c, 0, 0], [0] * 4])
        rollouts = helpers.rollouts(MASK)
        found = credit.length_penalty(**settings).stats(rollouts, SCORES, SCORES)
        assert (
            found["credit/length_cost"][0].item() == pytest.approx(sum(costs)) and found["credit/length_cost"][1] == 3
        )
        assert found["credit/length_over_rate"][0] == sum(cost > 0 for cost in costs)

    @pytest.mark.parametrize(
        "settings",
        [{"coef": -1}, {"coef": "x"}, {"target": -1}, {"target": 2.5}, {"target": 4, "limit": 4}, {"limit": 0}],
    )
    def test_bad_settings_are_named(self, settings: dict) -> None:
        with pytest.raises(ConfigError, match=f"length_penalty.{list(settings)[-1]}: got"):
            credit.length_penalty(**settings)

    def test_it_follows_redistribution(self) -> None:
        chain = credit.chain(credit.uniform(), credit.length_penalty(coef=0.1))
        assert_equal(apply(chain)[:1], [[0.5, 0.5, 0.5, 0.1]])
        with pytest.raises(ConfigError, match="after a credit that changes the return"):
            credit.chain(credit.length_penalty(), credit.uniform())
        for signed in (credit.attribution(), credit.shapley()):
            with pytest.raises(ConfigError, match="after a credit that changes the return"):
                credit.chain(credit.length_penalty(), signed)


# row 0: Σ|a| = 8, mean .5, deviations 2.5 −1.5 −.5 −.5; row 1: 1 · 1 2, all positive under a negative score
EFFECTS = torch.tensor([[3.0, -1, 0, 0], [1, 50, 1, 2], [7, -2, 7, 7], [7] * 4])


class TestAttribution:
    @pytest.mark.parametrize(
        ("settings", "expected"),
        [
            # row 0: Σ|a| = 4, mean ½: 2·(¼ + (a−½)/4) = .5 + 1.25, .5 − .75, .5 − .25 twice
            # row 1: Σ|a| = 4, mean 4/3: −⅓ + (a − 4/3)/4 = −⅓ − 1/12 twice, −⅓ + ⅙; row 2 has one token
            (
                {"mix": 1.0},
                [[1.75, -0.25, 0.25, 0.25], [-5 / 12, 0, -5 / 12, -1 / 6], [0, 3, 0, 0], [0] * 4],
            ),
            # half of that and half of the score on the last
            ({"mix": 0.5}, [[0.875, -0.125, 0.125, 1.125], [-5 / 24, 0, -5 / 24, -7 / 12], [0, 3, 0, 0], [0] * 4]),
            ({"mix": 0.0}, [[0, 0, 0, 2], [0, 0, 0, -1], [0, 3, 0, 0], [0] * 4]),
            ({"mix": 1.0, "signed": False}, [[1.5, 0.5, 0, 0], [-0.25, 0, -0.25, -0.5], [0, 3, 0, 0], [0] * 4]),
        ],
    )
    def test_table(self, settings: dict, expected: list[list[float]]) -> None:
        assert_equal(apply(credit.attribution(**settings), reward_attribution=EFFECTS), expected)
        assert_equal(apply(credit.attribution(**settings), reward_attribution=EFFECTS * 1e-6), expected)

    def test_effects_of_the_scores_sign_are_shares(self) -> None:
        """Then it is S·a/Σa, as attention with these weights: for a positive and for a negative score."""
        size = torch.rand(4, 4, generator=torch.Generator().manual_seed(0))
        found = apply(credit.attribution(mix=1.0), reward_attribution=size * SCORES.sign()[:, None])
        torch.testing.assert_close(found, apply(credit.attention(mix=1.0), reward_attention=size))

    @pytest.mark.parametrize("total", [2.0, -2.0, 1e-3])
    def test_what_raised_the_score_never_gets_less_and_all_is_bounded(self, total: float) -> None:
        effects = torch.tensor([[1.0, -1.001, 5, -5]])  # they nearly cancel: shares a/Σa would be in the thousands
        given = {"reward_attribution": effects}
        rollouts = helpers.rollouts(MASK[:1], given, scores=torch.tensor([total]), **given)
        found = credit.apply(credit.attribution(mix=1.0), rollouts)[0][0]
        assert found[2] > found[0] > found[1] > found[3]
        assert found.abs().max() <= abs(total) * (1 + 2 / 4) and found.sum().item() == pytest.approx(total, abs=1e-6)

    def test_no_effect_at_all_is_uniform_and_counted(self) -> None:
        given = {"reward_attribution": torch.zeros(4, 4)}
        rollouts = helpers.rollouts(MASK, given, scores=SCORES, **given)
        method = credit.attribution(mix=1.0)
        out = credit.apply(method, rollouts)[0]
        assert_equal(out, [[0.5] * 4, [-1 / 3, 0, -1 / 3, -1 / 3], [0, 3, 0, 0], [0] * 4])
        assert method.stats(rollouts, out, out)["credit/fallback_rate"][0] == 3

    def test_bad_settings_are_named(self) -> None:
        for name, value in (("mix", 2), ("signed", 1)):
            with pytest.raises(ConfigError, match=f"attribution.{name}: got"):
                credit.attribution(**{name: value})


class TestShapley:
    def given(self, method: credit.Credit) -> dict[str, Tensor]:
        values = torch.tensor([[0.5, 0.5, -1, 1.6], [-0.3, 9, -0.3, 0], [9, 2, 9, 9], [9] * 4])
        rows = {"empty": torch.tensor([0.4, -0.4, 0.5, 9]), "error": PROMPT.abs(), "calls": PROMPT, "joined": PROMPT}
        return {n: values if n.startswith("shapley_values") else rows[n.partition("@")[0][8:]] for n in method.needs}

    @pytest.mark.parametrize(
        ("settings", "expected"),
        [
            # Σφ = 1.6, −.6, 2; v(∅) = .4, −.4, .5 is put on the first; row 2's score has .5 more than the model gave
            ({}, [[0.9, 0.5, -1, 1.6], [-0.7, 0, -0.3, 0], [0, 3, 0, 0], [0] * 4]),
            ({"mix": 0.5}, [[0.45, 0.25, -0.5, 1.8], [-0.35, 0, -0.15, -0.5], [0, 3, 0, 0], [0] * 4]),
            ({"mix": 0.0}, [[0, 0, 0, 2], [0, 0, 0, -1], [0, 3, 0, 0], [0] * 4]),
        ],
    )
    def test_table(self, settings: dict, expected: list[list[float]]) -> None:
        method = credit.shapley(**settings)
        assert_equal(apply(method, **self.given(method)), expected)

    def test_what_clipping_took_stays_on_the_last_token(self) -> None:
        method = credit.shapley()
        rollouts = helpers.rollouts(MASK, self.given(method), scores=SCORES - 1, **self.given(method))
        assert_equal(credit.apply(method, rollouts)[0][:2], [[0.9, 0.5, -1, 0.6], [-0.7, 0, -0.3, -1]])

    def test_metrics_and_bad_settings(self) -> None:
        method = credit.shapley()
        rollouts = helpers.rollouts(MASK, self.given(method), **self.given(method))
        total, rows = method.stats(rollouts, SCORES, SCORES)["credit/shapley_error"]
        assert total.item() == pytest.approx(0.2 + 0.4 + 1.0) and rows == 3
        for name, value in (
            ("mix", -1),
            ("spans", "words"),
            ("spans", 0),
            ("budget", 5),
            ("seed", -1),
            ("spans", True),
        ):
            with pytest.raises(ConfigError, match=f"shapley.{name}: got"):
                credit.shapley(**{name: value})
