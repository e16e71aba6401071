"""The exact policy gradient of every credit against ∇J, over every response of small problems, and its table.

`python tests/math/test_exact_bias.py` prints the table.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

sys.path.append(str(Path(__file__).parents[1] / "support"))  # for the script; pytest has it in pythonpath
from mdp import (
    EOS,
    Problem,
    World,
    enumerate_world,
    expected_gradient,
    paid_before,
    random_scores,
    true_gradient,
    weighted_scores,
)

from apportion import Credit, credit

PROBLEMS = {"fixed length 3": (3, 3, False), "free end, at most 4": (3, 4, True)}
SEEDS = range(10)
UNBIASED: dict[str, Callable[[], Credit]] = {
    "sparse": credit.sparse,
    "prefix_difference": credit.prefix_difference,
    "prefix_difference(mix=.5)": lambda: credit.prefix_difference(mix=0.5),
    "prefix_difference(omit)": lambda: credit.prefix_difference(initial="omit"),
}
BIASED: dict[str, Callable[[], Credit]] = {
    "uniform": credit.uniform,
    "attention(mix=.8)": credit.attention,
    "attention(mix=1)": lambda: credit.attention(mix=1.0),
    "policy_attention(mix=.8)": credit.policy_attention,
    "attribution(mix=.8)": credit.attribution,
    "shapley": credit.shapley,
}


def world(name: str, seed: int) -> World:
    vocabulary, length, free_end = PROBLEMS[name]
    return enumerate_world(Problem(vocabulary, length, free_end, random_scores(vocabulary, length, seed), seed))


def with_any_potential(made: World) -> World:
    """Return the world with "prefix_scores" replaced by a potential that has nothing to do with the score."""
    rollouts = made.rollouts.with_evidence(prefix_scores=made.rollouts.evidence["potential"])
    return made._replace(rollouts=rollouts)


def relative(found: Tensor, true: Tensor) -> float:
    return float((found - true).norm() / true.norm())


def stop_part(made: World, gradient: Tensor) -> float:
    """Return the directional derivative along "every state's EOS logit rises"."""
    return float(gradient[:, EOS].sum())


def bias_table() -> list[dict[str, Any]]:
    """Return one row a problem and method: cosine with ∇J, |g−∇J|/|∇J| and the EOS part, means over ten problems.

    "stop" is (g−∇J) along a higher EOS logit in every state, over |∇J|; it means something with a free end alone.
    """
    rows = []
    for name in PROBLEMS:
        worlds = [world(name, seed) for seed in SEEDS]
        cases = [(method, make, worlds) for method, make in (UNBIASED | BIASED).items()]
        cases.insert(2, ("any state potential", credit.prefix_difference, [with_any_potential(w) for w in worlds]))
        for method, make, where in cases:
            pairs = [(w, expected_gradient(w, make()), true_gradient(w)) for w in where]
            cosine = [float((g * t).sum() / (g.norm() * t.norm())) for _, g, t in pairs]
            bias = [relative(g, t) for _, g, t in pairs]
            stop = [(stop_part(w, g) - stop_part(w, t)) / float(t.norm()) for w, g, t in pairs]
            means = {k: sum(v) / len(v) for k, v in (("cosine", cosine), ("bias", bias), ("stop", stop))}
            rows.append({"problem": name, "method": method, **means})
    return rows


@pytest.mark.parametrize("name", PROBLEMS)
def test_the_responses_are_all_there(name: str) -> None:
    made = world(name, 0)
    assert float(made.probability.detach().sum()) == pytest.approx(1.0, abs=1e-12)
    lengths = made.rollouts.mask.sum(dim=1)
    assert sorted(set(lengths.tolist())) == ([3] if name == "fixed length 3" else [1, 2, 3, 4])
    assert len(made.rollouts) == (27 if name == "fixed length 3" else 1 + 2 + 4 + 8 * 3)


@pytest.mark.parametrize("name", PROBLEMS)
def test_the_true_gradient_is_that_of_finite_differences(name: str) -> None:
    made, step = world(name, 3), 1e-5
    true = true_gradient(made)

    def value(state: int, token: int, change: float) -> float:
        with torch.no_grad():
            made.problem.logits[state, token] += change
            moved = enumerate_world(made.problem)
            made.problem.logits[state, token] -= change
        return float((moved.probability * moved.rollouts.scores.double()).sum())

    for state in range(0, len(true), 4):
        for token in range(true.shape[1]):
            slope = (value(state, token, step) - value(state, token, -step)) / (2 * step)
            assert float(true[state, token]) == pytest.approx(slope, abs=1e-8)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("method", UNBIASED)
@pytest.mark.parametrize("name", PROBLEMS)
def test_sparse_and_every_state_potential_have_the_true_gradient(name: str, method: str, seed: int) -> None:
    made = world(name, seed)
    true = true_gradient(made)
    assert true.norm() > 0.05
    torch.testing.assert_close(expected_gradient(made, UNBIASED[method]()), true, rtol=0, atol=1e-6)
    any_potential = expected_gradient(with_any_potential(made), UNBIASED[method]())
    torch.testing.assert_close(any_potential, true, rtol=0, atol=1e-6)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("method", BIASED)
@pytest.mark.parametrize("name", PROBLEMS)
def test_the_bias_of_a_credit_that_looks_ahead_is_what_its_reward_to_go_leaves_out(
    name: str, method: str, seed: int
) -> None:
    """g − ∇J = −E Σ_t ∇log π(a_t|s_t)·Σ_{k<t} r_k: zero where r_k depends on tokens up to k alone, not here."""
    made = world(name, seed)
    found, true = expected_gradient(made, BIASED[method]()), true_gradient(made)
    rewards, _ = credit.apply(BIASED[method](), made.rollouts)
    left_out = weighted_scores(made, paid_before(rewards))
    torch.testing.assert_close(found - true, -left_out, rtol=0, atol=1e-6)
    assert relative(found, true) > 0.05, "no bias where there should be one"


@pytest.mark.parametrize("method", UNBIASED)
def test_a_credit_that_does_not_look_ahead_leaves_nothing_out(method: str) -> None:
    for name in PROBLEMS:
        made = world(name, 1)
        rewards, _ = credit.apply(UNBIASED[method](), made.rollouts)
        assert weighted_scores(made, paid_before(rewards)).abs().max() < 1e-6


def test_shapley_is_unbiased_where_tokens_do_not_interact() -> None:
    """R a sum of each token's worth: φ_t is that worth, whatever follows, so nothing is left out."""
    worth = (0.3, -1.1, 0.8)
    scores = {s: 0.2 + sum(worth[i] for i in s) for s in random_scores(3, 4, 0)}
    for _, length, free_end in PROBLEMS.values():
        made = enumerate_world(Problem(3, length, free_end, scores))
        true = true_gradient(made)
        torch.testing.assert_close(expected_gradient(made, credit.shapley()), true, rtol=0, atol=1e-6)
        assert true.norm() > 0.05


def test_uniform_pays_for_going_on_where_the_score_ignores_the_length() -> None:
    """R = 1 for every response: ∇J = 0, and uniform lowers the EOS logit at every choice but the first token's."""
    vocabulary, length, free_end = PROBLEMS["free end, at most 4"]
    same = dict.fromkeys(random_scores(vocabulary, length, 0), 1.0)
    made = enumerate_world(Problem(vocabulary, length, free_end, same))
    assert true_gradient(made).abs().max() < 1e-12
    pushed = expected_gradient(made, credit.uniform())[:, EOS]
    states = made.problem.states
    assert (pushed[[i for state, i in states.items() if 0 < len(state) < length - 1]] < -1e-3).all()
    assert pushed[states[()]].abs() < 1e-6, "nothing was paid before the first token, so nothing is left out there"
    for harmless in (credit.sparse(), credit.prefix_difference()):
        assert expected_gradient(made, harmless).abs().max() < 1e-6


def test_the_table_separates_the_methods() -> None:
    rows = bias_table()
    assert len(rows) == len(PROBLEMS) * (len(UNBIASED) + 1 + len(BIASED))
    for row in rows:
        biased = row["method"] in BIASED
        assert (row["bias"] > 0.1) == biased and (row["cosine"] < 0.999) == biased, row
        assert row["bias"] < 1e-5 or biased


if __name__ == "__main__":
    lines = [
        "| problem | method | cosine with ∇J | bias, of its length | stop bias, of its length |",
        "|---|---|---|---|---|",
    ]
    for row in bias_table():
        numbers = " | ".join(f"{row[key]:.3f}" for key in ("cosine", "bias", "stop"))
        lines.append(f"| {row['problem']} | {row['method']} | {numbers} |")
    sys.stdout.write("\n".join(lines) + "\n")
