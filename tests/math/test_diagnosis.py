"""The diagnosis against exact answers: sampled figures on enumerable problems, and each statistic by brute force."""

from __future__ import annotations

import itertools
from dataclasses import replace

import helpers
import pytest
import torch
from mdp import EOS, Problem, World, enumerate_world, expected_gradient, random_scores, true_gradient
from torch import Tensor

from apportion import Rollouts, advantages, credit, losses, segments
from apportion.config import RLConfig
from apportion.stages.diagnose import gradients as estimates
from apportion.stages.diagnose.candidates import Candidate, candidates
from apportion.stages.diagnose.gradients import Gradients
from apportion.stages.method import build_method
from apportion.stages.rl.update import make_targets

PROBLEMS = {"fixed length": (3, 3, False), "free end": (3, 4, True)}
UNITS, SAMPLES = 1500, 8
CREDITS = {
    "sparse": credit.sparse,
    "uniform": credit.uniform,
    "attention": lambda: credit.attention(mix=1.0),
    "prefix_difference": credit.prefix_difference,
}


def sampled(world: World, seed: int) -> tuple[Rollouts, Tensor]:
    """Return (rollouts drawn from the policy in groups, ∇ log π of each token (N,T,states·vocabulary))."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.multinomial(world.probability.detach(), UNITS * SAMPLES, replacement=True, generator=generator)
    rollouts = world.rollouts.select(drawn)
    rollouts = replace(rollouts, group=torch.arange(UNITS).repeat_interleave(SAMPLES))
    policy = world.problem.logits.detach().softmax(dim=1).float()
    count, size = policy.shape
    table = torch.zeros(*rollouts.mask.shape, count, size)
    for row, ids in enumerate(world.problem.responses()):
        for t, token in enumerate(ids):
            state = world.problem.states[ids[:t]]
            step = -policy[state].clone()
            step[token] += 1.0
            table[drawn == row, t, state] = step
    return rollouts, table.flatten(2)


def by_unit(rows: Tensor) -> Tensor:
    return rows.reshape(UNITS, SAMPLES, *rows.shape[1:]).mean(dim=1)


@pytest.fixture(scope="module", params=PROBLEMS, ids=list(PROBLEMS))
def measured(request: pytest.FixtureRequest) -> tuple[World, Gradients, dict[str, Tensor], Tensor]:
    """Return the world, its sampled gradients, each method's advantages, and ∇ log π."""
    vocabulary, length, free_end = PROBLEMS[request.param]
    world = enumerate_world(Problem(vocabulary, length, free_end, random_scores(vocabulary, length, 3), 3))
    rollouts, steps = sampled(world, seed=0)
    whole = estimates.centred_scores(rollouts.scores, rollouts.group)
    found = {"true": torch.where(rollouts.mask, whole[:, None], 0.0)}
    for name, make in CREDITS.items():
        candidate = Candidate(make(), segments.tokens(), advantages.gae(lam=1.0))
        found[name] = candidate.advantages(rollouts)[0]
    rows = {name: (a[..., None] * steps).sum(dim=1) for name, a in found.items()}
    gradients = Gradients(
        {name: by_unit(g) for name, g in rows.items()},
        {name: by_unit(g.square().sum(dim=1)) for name, g in rows.items()},
    )
    return world, gradients, found, steps


@pytest.mark.parametrize("name", CREDITS)
def test_cosine_and_bias_are_the_exact_ones_within_their_own_error(measured, name: str) -> None:
    world, gradients, _, _ = measured
    exact, true = expected_gradient(world, CREDITS[name]()), true_gradient(world)
    cosine = float((exact * true).sum() / (exact.norm() * true.norm()))
    bias = float((exact - true).norm() / true.norm())
    found = gradients.interval(lambda w: gradients.cosine(name, w))
    half = (found["high"] - found["low"]) / 2
    assert half < 0.06, "the interval is too wide for this test to say anything"
    assert abs(found["mean"] - cosine) <= 1.6 * half + 1e-3, (found, cosine)
    found = gradients.interval(lambda w: gradients.bias(name, w))
    half = (found["high"] - found["low"]) / 2
    assert half < 0.15
    if bias < 1e-5:  # the sampled one is a norm: it cannot fall below 0
        assert found["low"] < 0.05 and found["mean"] < 0.15
    else:
        assert abs(found["mean"] - bias) <= 1.6 * half, (found, bias)


def test_biased_and_unbiased_credits_are_distinguished(measured) -> None:
    _, gradients, _, _ = measured
    cosine = {name: gradients.interval(lambda w, n=name: gradients.cosine(n, w)) for name in CREDITS}
    assert estimates.direction(cosine["sparse"]) == estimates.direction(cosine["prefix_difference"])
    assert estimates.direction(cosine["sparse"]) == estimates.VERDICTS[0]
    assert cosine["uniform"]["high"] < cosine["sparse"]["low"]


def test_the_stop_bias_is_the_exact_one_within_its_own_error(measured) -> None:
    world, _, found, steps = measured
    if not world.problem.free_end:
        pytest.skip("responses of one length have no end to choose")
    eos = steps.reshape(*steps.shape[:2], -1, world.problem.vocabulary)[..., EOS].sum(dim=-1)
    stop = {name: by_unit((a * eos).sum(dim=1)) for name, a in found.items()}
    true = float(true_gradient(world)[:, EOS].sum())
    for name, make in CREDITS.items():
        exact = float(expected_gradient(world, make())[:, EOS].sum()) - true
        interval = estimates.mean_over_units(stop[name] - stop["true"])
        half = (interval["high"] - interval["low"]) / 2
        assert half < 0.05 and abs(interval["mean"] - exact) <= 1.6 * half, (name, interval, exact)


def test_the_signal_to_noise_ratio_is_that_of_real_batches(measured) -> None:
    """Means of 4 units, over and over: their spread around the mean is the noise that `snr` states."""
    _, gradients, found, steps = measured
    for name in ("sparse", "uniform"):
        units = by_unit((found[name][..., None] * steps).sum(dim=1))
        batches = units.reshape(-1, 4, units.shape[1]).mean(dim=1)
        noise = (batches - batches.mean(dim=0)).square().sum(dim=1).mean().sqrt()
        expected = float(units.mean(dim=0).norm() / noise)
        value = float(gradients.snr(name, torch.ones(1, UNITS, dtype=torch.float64), 4 * SAMPLES)[0])
        assert value == pytest.approx(expected, rel=0.1)


def test_inner_products_leave_a_unit_with_itself_out() -> None:
    generator = torch.Generator().manual_seed(0)
    one, two = (torch.randn(5, 7, generator=generator) for _ in range(2))
    gradients = Gradients({"true": one, "a": two}, {"true": torch.ones(5), "a": torch.ones(5)})
    pairs = [(i, j) for i, j in itertools.product(range(5), repeat=2) if i != j]
    expected = sum(float(one[i] @ two[j]) for i, j in pairs) / len(pairs)
    found = gradients.inner("a", "true", torch.ones(1, 5, dtype=torch.float64))
    assert float(found[0]) == pytest.approx(expected, abs=1e-6)
    # a unit drawn twice is still one unit: its copies are not paired with each other
    weights = torch.tensor([[2.0, 0, 1, 1, 1]], dtype=torch.float64)
    chosen = [0, 0, 2, 3, 4]
    pairs = [(i, j) for i, j in itertools.product(chosen, repeat=2) if i != j]
    expected = sum(float(one[i] @ two[j]) for i, j in pairs) / len(pairs)
    assert float(gradients.inner("a", "true", weights)[0]) == pytest.approx(expected, abs=1e-6)


def test_pure_noise_is_not_resolved() -> None:
    generator = torch.Generator().manual_seed(1)
    noise = {name: torch.randn(40, 500, generator=generator) for name in ("true", "a")}
    gradients = Gradients(noise, {name: x.square().sum(dim=1) for name, x in noise.items()})
    found = gradients.interval(lambda w: gradients.cosine("a", w))
    assert estimates.direction(found) == estimates.VERDICTS[3]


def test_noise_that_a_method_shares_with_the_true_gradient_is_not_a_direction() -> None:
    """Both norms are 0, and their unbiased estimates fall below 0 together: the product of two such says nothing."""
    generator = torch.Generator().manual_seed(1)
    resolved, below = 0, 0
    for _ in range(40):
        true = torch.randn(40, 300, generator=generator)
        noise = {"true": true, "a": true + 0.1 * torch.randn(40, 300, generator=generator)}
        gradients = Gradients(noise, {name: x.square().sum(dim=1) for name, x in noise.items()})
        norm = float(gradients.inner("true", "true", torch.ones(1, 40, dtype=torch.float64)))
        found = gradients.interval(lambda w, g=gradients: g.cosine("a", w))
        assert norm > 0 or found["mean"] is None, (norm, found)
        below += norm < 0
        resolved += estimates.direction(found) != estimates.VERDICTS[3]
    assert below > 10 and resolved <= 4  # a figure that 95% of the resamples resolve: 1 in 20 by chance


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (0.95, 1.0, 0),
        (0.94, 1.0, 1),
        (0.7, 0.9, 1),
        (0.5, 0.9, 2),
        (-0.2, 0.1, 2),
        (0.55, 1.0, 3),
        (0.4, 0.95, 3),
        (0.3, 0.9, 3),
    ],
)
def test_a_verdict_follows_from_the_whole_interval(low: float, high: float, verdict: int) -> None:
    found = estimates.direction({"mean": (low + high) / 2, "low": low, "high": high})
    assert found == estimates.VERDICTS[verdict]


def test_a_named_algorithm_weighs_tokens_as_the_first_step_of_its_loss() -> None:
    """GRPO and GSPO divide by the length of each response, which is their bias; the others weigh all tokens alike."""
    mask = helpers.bools([[1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0]])
    scores = torch.tensor([3.0, -1.0, 0.5, 2.0])
    batch = helpers.rollouts(mask, scores=scores, group=torch.zeros(4, dtype=torch.int64), dirty=False)
    plain = (scores - scores.mean())[:, None] * mask
    by_length = plain / mask.sum(dim=1, keepdim=True)
    by_length *= plain.abs().sum() / by_length.abs().sum()
    named = {"ppo": {}, "reinforce": {}, "dapo": {}, "cispo": {}, "dr_grpo": {"length": 7}}
    expected = {name: (losses.find(name)(**kwargs), plain) for name, kwargs in named.items()}
    expected["ppo(action)"] = losses.ppo(ratio="action"), plain
    expected["grpo"] = losses.grpo(kl_coef=0.04), by_length
    expected["gspo"] = losses.gspo(), by_length
    for name, (loss, weights) in expected.items():
        made = Candidate(credit.sparse(), segments.whole_response(), advantages.group_relative(std=False), loss)
        torch.testing.assert_close(made.advantages(batch)[0], weights, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("name", ["reinforce++", "reinforce++-baseline"])
def test_reinforce_pp_weighs_tokens_as_its_run_does(name: str) -> None:
    """The whitening that the run has is its normalisation: the weights are the update's targets, up to one factor."""
    [(label, made)] = candidates([name], 1.0).items()
    config = RLConfig(reward_model="unused", algorithm=name, compare=[])
    config.sampling.stop = "eos"
    method = build_method(config)
    assert label == name and config.ppo.whiten_advantages
    parts = []
    for seed, shift in ((0, 3.0), (1, -1.0)):
        mask = torch.arange(6) < torch.tensor([6, 2, 4, 1, 5, 3])[:, None]
        group = torch.tensor([0, 0, 0, 4, 4, 4])
        batch = helpers.rollouts(mask, seed=seed, group=group, dirty=False)
        parts.append(replace(batch, scores=batch.scores + shift))
    batch = parts[0]
    rewards, _ = credit.apply(credit.sparse(), batch)
    ids = segments.tokens()(batch)
    targets = make_targets(method.estimate(rewards, ids, batch), ids, batch, config.ppo).advantages
    weights, _ = made.advantages(batch)
    torch.testing.assert_close(weights, targets, rtol=1e-4, atol=1e-5)
    assert abs(float(weights[batch.mask].mean())) < 1e-5 and not made.in_score_units
    # a diagnosis whitens by the moments of all its rollouts
    raw = [made._estimate(part)[0][part.mask].double() for part in parts]
    every = torch.cat(raw)
    moments = made.whitening(parts)
    for part, own in zip(parts, raw, strict=True):
        found, _ = made.advantages(part, moments)
        torch.testing.assert_close(found[part.mask].double(), (own - every.mean()) / every.std(), rtol=1e-4, atol=1e-5)
    [plain] = candidates(["ppo"], 1.0).values()
    assert plain.whitening(parts) is None and plain.in_score_units


def test_macro_actions_and_groups_with_a_free_end() -> None:
    """Macro GAE and RLOO are unbiased; a mean that holds the row itself costs 1/n; GRPO's 1/|y| turns the direction."""
    world = enumerate_world(Problem(3, 4, True, random_scores(3, 4, 3), 3))
    rollouts, steps = sampled(world, seed=0)
    whole = segments.whole_response()
    made = {
        "macro": Candidate(credit.sparse(), segments.ngrams(n=2), advantages.gae(lam=1.0), losses.ppo()),
        "rloo": Candidate(credit.sparse(), whole, advantages.leave_one_out(), losses.reinforce()),
        "dr-grpo": Candidate(credit.sparse(), whole, advantages.group_relative(std=False), losses.dr_grpo()),
        "grpo": Candidate(credit.sparse(), whole, advantages.group_relative(std=False), losses.grpo()),
    }
    scores = estimates.centred_scores(rollouts.scores, rollouts.group)
    found = {"true": torch.where(rollouts.mask, scores[:, None], 0.0)}
    found |= {name: candidate.advantages(rollouts)[0] for name, candidate in made.items()}
    rows = {name: (a[..., None] * steps).sum(dim=1) for name, a in found.items()}
    squares = {name: by_unit(g.square().sum(dim=1)) for name, g in rows.items()}
    gradients = Gradients({name: by_unit(g) for name, g in rows.items()}, squares)
    cosine = {name: gradients.interval(lambda w, n=name: gradients.cosine(n, w)) for name in made}
    bias = {name: gradients.interval(lambda w, n=name: gradients.bias(n, w)) for name in made}
    for name in ("macro", "rloo", "dr-grpo"):
        assert cosine[name]["low"] > 0.99, name
    assert bias["macro"]["high"] < 0.05 and bias["rloo"]["high"] < 0.01
    assert bias["dr-grpo"]["mean"] == pytest.approx(1 / SAMPLES, abs=0.005)
    assert cosine["grpo"]["high"] < 0.99


def test_the_baseline_is_the_mean_of_the_others_that_have_the_position() -> None:
    mask = helpers.bools([[1, 1, 1], [1, 0, 0], [1, 1, 0], [1, 1, 0]])
    returns = torch.tensor([[6.0, 4, 2], [3, torch.nan, 0], [0, 2, torch.inf], [5, 5, 0]])
    group = torch.tensor([7, 7, 7, 2])
    found = estimates.leave_one_out_baseline(returns, mask, group)
    expected = torch.tensor([[6 - 1.5, 4 - 2, 2 - 0], [3 - 3.0, 0, 0], [0 - 4.5, 2 - 4, 0], [5, 5, 0]])
    torch.testing.assert_close(found, expected)


def test_squared_norms_are_those_of_the_outer_products() -> None:
    generator = torch.Generator().manual_seed(2)
    weights = torch.randn(3, 4, generator=generator)
    left, right = torch.randn(3, 4, 5, generator=generator), torch.randn(3, 4, 6, generator=generator)
    outer = torch.einsum("bt,btd,bte->bde", weights, left, right)
    torch.testing.assert_close(estimates.row_squares(weights, left, right), outer.square().sum(dim=(1, 2)))
