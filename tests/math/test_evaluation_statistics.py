"""Statistics of `apportion evaluate`: tables by hand, brute force, and references in plain numpy and scipy."""

from __future__ import annotations

import itertools
import math
import random

import numpy as np
import pytest
from scipy.optimize import minimize

from apportion.intervals import distinct
from apportion.stages.evaluate.statistics import bootstrap, diversity, wins
from apportion.stages.evaluate.statistics import length_controlled as lc


def test_a_win_rate_by_hand_counts_a_tie_half() -> None:
    """Four prompts: won, tied, lost, won: 2.5 of 4."""
    found = wins.wins(np.array([[2.0], [1.0], [0.0], [5.0]]), np.array([[1.0], [1.0], [3.0], [-5.0]]))
    assert (
        found.win.tolist() == [1, 0, 0, 1]
        and found.tie.tolist() == [0, 1, 0, 0]
        and found.loss.tolist() == [0, 0, 1, 0]
    )
    rate = wins.win_rate(found)
    assert (rate["mean"], rate["win"], rate["tie"], rate["loss"]) == (0.625, 0.5, 0.25, 0.25)
    assert 0 < rate["low"] < 0.625 < rate["high"] < 1


def test_all_pairs_of_a_prompt_count_once_together() -> None:
    """Prompt 1: 2 > 1, 2 = 2, 0 < 1, 0 < 2: one win, one tie, two losses of four. Prompt 2 has one pair, a win."""
    first, second = np.array([[2.0, 0.0], [9.0, np.nan]]), np.array([[1.0, 2.0], [8.0, np.nan]])
    found = wins.wins(first, second)
    assert found.win.tolist() == [0.25, 1.0] and found.tie.tolist() == [0.25, 0.0]
    assert wins.win_rate(found)["mean"] == pytest.approx((0.375 + 1) / 2)


def test_a_margin_ties_and_a_prompt_without_scores_is_left_out() -> None:
    first, second = np.array([[1.0], [1.3], [np.nan]]), np.array([[1.1], [1.0], [0.0]])
    found = wins.wins(first, second, margin=0.2)
    assert found.tie[:2].tolist() == [1.0, 0.0] and math.isnan(found.win[2])
    assert wins.win_rate(found)["mean"] == 0.75


def test_swapping_the_sides_swaps_wins_and_losses() -> None:
    generator = np.random.default_rng(0)
    a, b = generator.integers(0, 3, (20, 2)).astype(float), generator.integers(0, 3, (20, 3)).astype(float)
    there, back = wins.win_rate(wins.wins(a, b)), wins.win_rate(wins.wins(b, a))
    assert there["mean"] == pytest.approx(1 - back["mean"]) and there["win"] == pytest.approx(back["loss"])
    brute = np.mean([np.mean([(x > y) + (x == y) / 2 for x in p for y in q]) for p, q in zip(a, b, strict=True)])
    assert there["mean"] == pytest.approx(brute)


def test_a_policy_that_wins_everything_still_has_an_interval() -> None:
    rate = wins.win_rate(wins.wins(np.ones((30, 1)), np.zeros((30, 1))))
    assert rate["mean"] == 1.0 and rate["high"] == pytest.approx(1.0) and 0.8 < rate["low"] < 1.0


def test_the_bootstrap_is_that_of_a_loop() -> None:
    generator = random.Random(3)
    first = np.array([generator.gauss(0.4, 1) for _ in range(23)])
    second = np.array([generator.gauss(0.0, 1) for _ in range(23)])
    found = bootstrap.difference(first, second, 400, seed=5)
    means = []
    for row in bootstrap.draws(23, 400, 5):
        means.append(sum(float(first[i]) - float(second[i]) for i in row) / 23)
    means.sort()

    def percentile(q: float) -> float:
        place = q * 399
        low = math.floor(place)
        return means[low] + (place - low) * (means[min(low + 1, 399)] - means[low])

    assert found["mean"] == pytest.approx(float((first - second).mean()))
    assert (found["low"], found["high"]) == pytest.approx((percentile(0.025), percentile(0.975)))
    assert found == bootstrap.difference(first, second, 400, seed=5)
    assert found != bootstrap.difference(first, second, 400, seed=6)


def test_pairing_removes_what_makes_a_prompt_hard_for_both() -> None:
    hardness = np.random.default_rng(1).normal(0, 50, 40)
    found = bootstrap.difference(hardness + 1.0, hardness, 500, seed=0)
    assert (found["low"], found["high"]) == pytest.approx((1.0, 1.0))


def test_the_interval_covers_the_truth_about_95_times_in_100() -> None:
    generator = np.random.default_rng(2)
    hits = 0
    for trial in range(200):
        gaps = generator.normal(0.3, 1.0, 60)
        found = bootstrap.difference(gaps, np.zeros(60), 300, seed=trial)
        hits += found["low"] <= 0.3 <= found["high"]
    assert 178 <= hits <= 199


def pairs(preference: np.ndarray, length: np.ndarray, weight: np.ndarray | None = None) -> lc.Pairs:
    return lc.Pairs(preference, length, np.ones(len(length)) if weight is None else weight, np.arange(len(length)))


def reference(features: np.ndarray, y: np.ndarray, weight: np.ndarray) -> tuple[np.ndarray, float]:
    """Return the minimum of the penalised log loss by scipy: intercept free, |coefficients|²/(2C)."""

    def loss(w: np.ndarray) -> float:
        z = features @ w[:-1] + w[-1]
        terms = y * np.logaddexp(0, -z) + (1 - y) * np.logaddexp(0, z)
        return float((weight * terms).sum() + (w[:-1] ** 2).sum() / (2 * lc.C))

    found = minimize(loss, np.zeros(features.shape[1] + 1), method="BFGS", options={"gtol": 1e-9})
    return found.x[:-1], float(found.x[-1])


def test_the_fit_is_that_of_a_plain_logistic_loss() -> None:
    generator = np.random.default_rng(4)
    length, gamma = generator.normal(30, 60, 80), generator.normal(0, 1, 80)
    weight = generator.uniform(0.5, 1.5, 80)
    chance = 1 / (1 + np.exp(-(0.4 + 0.9 * np.tanh(length / length.std(ddof=1)) + 0.5 * gamma)))
    y = np.where(generator.random(80) < 0.15, 0.5, (generator.random(80) < chance).astype(float))
    features = np.stack([np.tanh(length / length.std(ddof=1)), gamma], axis=1)
    slopes, offset = reference(features, y, weight)
    expected = float(np.average(1 / (1 + np.exp(-(offset + slopes[1] * gamma))), weights=weight))
    assert lc.length_controlled(pairs(y, length, weight), gamma) == pytest.approx(expected, abs=1e-5)
    without = reference(features[:, :1], y, weight)[1]
    assert lc.length_controlled(pairs(y, length, weight)) == pytest.approx(1 / (1 + math.exp(-without)), abs=1e-5)


def test_where_length_alone_decides_the_controlled_rate_is_a_half() -> None:
    """The longer answer wins, whoever wrote it, and the policy gives longer ones: 80% raw."""
    generator = np.random.default_rng(5)
    length = np.abs(generator.normal(0, 80, 400)) + 1
    length[:80] *= -1
    y = (length > 0).astype(float)
    assert y.mean() == 0.8
    assert lc.length_controlled(pairs(y, length)) == lc.length_controlled(pairs(1 - y, length)) == 0.5
    noisy = (generator.random(400) < 1 / (1 + np.exp(-3 * np.tanh(length / length.std(ddof=1))))).astype(float)
    assert noisy.mean() > 0.65
    assert lc.length_controlled(pairs(noisy, length)) == pytest.approx(0.5, abs=0.1)


def test_where_quality_alone_decides_it_is_the_raw_rate() -> None:
    """Every length difference occurs with the same preferences, so length explains nothing."""
    length = np.array([-30.0, -10.0, 10.0, 30.0] * 10)
    y = np.repeat(np.array([1.0] * 7 + [0.0] * 2 + [0.5]), 4)
    assert lc.length_controlled(pairs(y, length)) == pytest.approx(y.mean(), abs=1e-4)
    assert lc.length_controlled(pairs(y, np.zeros(40))) == pytest.approx(y.mean())


def test_swapping_the_policies_gives_the_rest_to_one() -> None:
    generator = np.random.default_rng(6)
    length, gamma = generator.normal(20, 40, 60), generator.normal(0, 1, 60)
    y = generator.choice([0.0, 0.5, 1.0], 60, p=[0.3, 0.2, 0.5])
    there, back = lc.length_controlled(pairs(y, length), gamma), lc.length_controlled(pairs(1 - y, -length), -gamma)
    assert there is not None and back is not None and there + back == pytest.approx(1.0, abs=1e-6)


def test_what_cannot_be_told_is_none_and_unanimous_preferences_stay() -> None:
    y = np.array([1.0, 0.0, 1.0])
    assert lc.length_controlled(pairs(y, np.array([7.0, 7.0, 7.0]))) is None
    assert lc.length_controlled(pairs(np.zeros(0), np.zeros(0))) is None
    assert lc.length_controlled(pairs(np.ones(3), np.array([1.0, 5.0, 9.0]))) == 1.0
    assert lc.length_controlled(pairs(np.full(3, 0.5), np.array([1.0, 5.0, 9.0]))) == 0.5


def test_pairs_of_several_answers_share_the_weight_of_their_prompt() -> None:
    first, second = np.array([[3.0, 1.0], [0.0, np.nan]]), np.array([[2.0], [0.0]])
    lengths, others = np.array([[10.0, 4.0], [6.0, 0.0]]), np.array([[5.0], [9.0]])
    found = lc.pairs_of(first, second, lengths, others)
    assert found.preference.tolist() == [1.0, 0.0, 0.5] and found.length.tolist() == [5.0, -1.0, -3.0]
    assert found.weight.tolist() == [0.5, 0.5, 1.0] and found.prompt.tolist() == [0, 0, 1]


def test_difficulty_is_found_from_other_policies_and_sharpens_the_rate() -> None:
    generator = np.random.default_rng(7)
    gamma, count = generator.normal(0, 2, 120), 120
    others = []
    for quality in (0.5, -0.3, 0.1):
        length = generator.normal(10, 30, count)
        chance = 1 / (1 + np.exp(-(quality + gamma + 0.8 * np.tanh(length / 30))))
        others.append(pairs((generator.random(count) < chance).astype(float), length))
    found = lc.difficulties(others, count)
    assert found is not None and np.corrcoef(found, gamma)[0, 1] > 0.7
    assert (found.mean(), found.std()) == pytest.approx((0.0, 1.0), abs=1e-9)
    assert lc.difficulties([], count) is None


def test_bootstrap_of_a_statistic_leaves_out_resamples_without_a_value() -> None:
    values = np.array([1.0, 2.0, 3.0, 10.0])

    def median(rows: np.ndarray) -> float | None:
        return None if 3 in rows else float(np.median(values[rows]))

    assert bootstrap.over_prompts(median, 4, 50, 0) is None
    found = bootstrap.over_prompts(lambda rows: float(values[rows].mean()), 4, 200, 0)
    plain = bootstrap.difference(values, np.zeros(4), 200, 0)
    assert found == pytest.approx(plain)


def test_distinct_n_by_hand() -> None:
    rows = [[1, 2, 1, 2], [1, 2, 3]]
    assert distinct(rows, 1) == 3 / 7  # 1, 2, 3 of seven tokens
    assert distinct(rows, 2) == 3 / 5  # 12 21 12 | 12 23
    assert distinct(rows, 3) == 3 / 3  # 121 212 | 123
    assert distinct([[1]], 2) == 0.0


def test_self_similarity_is_the_mean_of_all_pairs() -> None:
    generator = random.Random(8)
    answers = [[[generator.randrange(4) for _ in range(generator.randrange(9))] for _ in range(3)] for _ in range(5)]

    def cosine(a: list[int], b: list[int]) -> float:
        one, two = diversity.unit_bigrams(a), diversity.unit_bigrams(b)
        return sum(value * two.get(pair, 0.0) for pair, value in one.items())

    places = [(p, i) for p in range(5) for i in range(3)]
    values = {(a, b): cosine(answers[a[0]][a[1]], answers[b[0]][b[1]]) for a, b in itertools.permutations(places, 2)}
    between = [v for (a, b), v in values.items() if a[0] != b[0]]
    within = [v for (a, b), v in values.items() if a[0] == b[0]]
    assert diversity.self_similarity(answers) == pytest.approx((np.mean(between), np.mean(within)))
    assert diversity.self_similarity([[[1, 2, 3]], [[1, 2, 3]]]) == (pytest.approx(1.0), None)
    assert diversity.self_similarity([[[1, 2]]]) == (None, None)
