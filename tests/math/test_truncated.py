"""The worth of responses that were cut off: exact on enumerable problems, and every credit × truncated × estimator."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import helpers
import pytest
import torch
from mdp import Problem, World, enumerate_world, random_scores
from torch import Tensor

from apportion import Credit, Rollouts, advantages, credit, segments
from apportion.config import RLConfig
from apportion.errors import ConfigError
from apportion.stages.method import build_method
from apportion.stages.rl.train import apply_truncation
from apportion.stages.rl.update import make_targets
from apportion.types import Method

CUT = 2
WORTH: dict[str, Callable[[], Credit]] = {
    "sparse": credit.sparse,
    "kl_penalty": lambda: credit.chain(credit.sparse(), credit.kl_penalty(coef=0.3)),
    "implicit": lambda: credit.implicit(coef=0.5, clip=None),
    "process": credit.process,
    "process(keep)": lambda: credit.process(keep=True),
    "length_penalty": lambda: credit.length_penalty(coef=0.2, target=1),
    "length_penalty(limit)": lambda: credit.length_penalty(coef=0.7, target=1, limit=3),
    "all": lambda: credit.chain(credit.implicit(coef=0.5), credit.length_penalty(coef=0.2), credit.kl_penalty()),
}
REFUSED: dict[str, Callable[[], Credit]] = {
    "uniform": credit.uniform,
    "uniform(mix=.3)": lambda: credit.uniform(mix=0.3),
    "attention": credit.attention,
    "policy_attention": credit.policy_attention,
    "attribution": credit.attribution,
    "attribution(unsigned)": lambda: credit.attribution(signed=False),
    "shapley": credit.shapley,
    "prefix_difference": credit.prefix_difference,
    "prefix_difference(omit)": lambda: credit.prefix_difference(initial="omit"),
    "process(not causal)": lambda: credit.process(causal=False),
    "abc": lambda: credit.chain(credit.attention(), credit.kl_penalty()),
}


def world() -> World:
    """Return a small problem with a free end, and evidence of the tokens so far for the credits of `WORTH`."""
    made = enumerate_world(Problem(3, 4, True, random_scores(3, 4, 3), 3))
    state = made.rollouts.evidence["potential"]
    later = torch.rand(state.shape, generator=torch.Generator().manual_seed(5))
    known = {"reference_logprobs": -state.abs() - 0.1, "implicit_logprobs": state - 0.4, "process_rewards": 0.3 * state}
    return made._replace(rollouts=made.rollouts.with_evidence(**known, later=later))


def cut_off(made: World, rewards: Tensor) -> tuple[Rollouts, Tensor]:
    """Return (a row for each prefix of CUT tokens that continues, with its exact value; its worth in expectation).

    `rewards` (N,T) are those of the whole responses. The values before the cut are 0, so that returns are totals.
    """
    batch, chance = made.rollouts, made.probability.detach()
    rows, values, totals = [], [], []
    long = batch.mask.sum(dim=1) > CUT
    for prefix in batch.response_ids[long][:, :CUT].unique(dim=0):
        same = long & (batch.response_ids[:, :CUT] == prefix).all(dim=1)
        share = chance * same / (chance * same).sum()
        rows.append(int(same.nonzero()[0]))
        values.append(float((share * rewards[:, CUT:].double().sum(dim=1)).sum()))
        totals.append(float((share * rewards.double().sum(dim=1)).sum()))
    cut = batch.select(torch.tensor(rows))
    mask = cut.mask & (torch.arange(cut.mask.shape[1]) < CUT)
    cut = replace(cut, mask=mask, valid=mask, scores=torch.zeros(len(rows)), ended=torch.zeros(len(rows)).bool())
    known = {"bootstrap_values": torch.tensor(values), "values": torch.zeros(mask.shape)}
    return cut.with_evidence(**known), torch.tensor(totals)


def total(rewards: Tensor, cut: Rollouts) -> Tensor:
    """Return what each row is worth to its first token."""
    return advantages.gae(lam=1.0)(rewards, segments.tokens()(cut), cut).returns[:, 0]


@pytest.mark.parametrize("name", WORTH)
def test_a_cut_response_is_worth_what_it_would_have_been_worth_in_expectation(name: str) -> None:
    made, method = world(), WORTH[name]()
    rewards, _ = credit.apply(method, made.rollouts)
    cut, expected = cut_off(made, rewards)
    assert len(cut) == 4 and expected.std() > 0.1
    torch.testing.assert_close(total(credit.apply(method, cut)[0], cut), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", REFUSED)
def test_a_credit_that_pays_tokens_by_what_follows_is_refused(name: str) -> None:
    """And rightly so: the sum of what a cut row is paid and the exact value after it is not what it is worth."""
    made, method = world(), REFUSED[name]()
    if name == "process(not causal)":
        made = made._replace(rollouts=made.rollouts.with_evidence(process_rewards=made.rollouts.evidence["later"]))
    rewards, _ = credit.apply(method, made.rollouts)
    cut, expected = cut_off(made, rewards)
    with pytest.raises(
        ConfigError, match=r"credit: got 'one that pays tokens before a cut by .* 4 responses that were"
    ):
        credit.apply(method, cut)
    placed = torch.zeros(cut.mask.shape)
    off = (total(method.assign(cut, placed, method.init())[0], cut) - expected).abs().max()
    assert off > 0.05, "nothing is left out: why is it refused?"
    credit.apply(method, replace(cut, ended=~cut.ended))
    credit.apply(method, replace(cut, evidence={k: v for k, v in cut.evidence.items() if k != "bootstrap_values"}))


def test_the_numbers_of_a_constant_score() -> None:
    """Every response is worth 1, ends with p = .3 a token, and is cut at 4: so is a cut one, or it is refused."""
    p, most = 0.3, 60
    chance = {n: p * (1 - p) ** (n - 1) for n in range(1, most)}

    def values(rewards: Callable[[int], list[float]]) -> list[float]:
        going = [{n: q for n, q in chance.items() if n > t} for t in range(5)]
        return [sum(q * sum(rewards(n)[t:]) for n, q in g.items()) / sum(g.values()) for t, g in enumerate(going)]

    mask = torch.ones(2, 4, dtype=torch.bool)
    for method, rewards in (
        (credit.sparse(), lambda n: [0.0] * (n - 1) + [1.0]),
        (credit.uniform(), lambda n: [1 / n] * n),
    ):
        known = values(rewards)
        given = {"values": torch.tensor([known[:4]] * 2), "bootstrap_values": torch.tensor([0.0, known[4]])}
        ends = {"scores": torch.tensor([1.0, 0.0]), "ended": torch.tensor([True, False])}
        rollouts = helpers.rollouts(mask, given, **given, **ends)
        if method.share is not None:
            with pytest.raises(ConfigError, match="1 responses that were cut off"):
                credit.apply(method, rollouts)
        else:
            torch.testing.assert_close(total(credit.apply(method, rollouts)[0], rollouts), torch.ones(2))


# --- every credit × truncated × estimator, through the settings of a run ----------------------------------------------

CREDITS: dict[str, list[Any]] = {
    **{name: [name] for name in credit.names() if name not in ("implicit", "process", "kl_penalty", "length_penalty")},
    "implicit": ["sparse", {"implicit": {"model": "somewhere"}}],
    "process": [{"process": {"function": "reward_functions:per_token"}}],
    "process(step)": [{"process": {"function": "reward_functions:per_token", "unit": "step"}}],
    "kl_penalty": ["sparse", {"kl_penalty": {"coef": 0.2}}],
    "length_penalty": ["sparse", {"length_penalty": {"coef": 0.5, "target": 2}}],
    "abc": ["attention", "kl_penalty"],
}
ESTIMATORS: list[Any] = [
    {"gae": {"lam": 1.0}},
    "monte_carlo",
    "reinforce_pp",
    "leave_one_out",
    {"group_relative": {"credit_mix": 0.5}},
]
MODES = ("terminal", "penalty", "mask", "bootstrap")
SPREADS = {name for name in CREDITS if name.split("(")[0] in REFUSED} | {"process(step)"}


def run_of(chain: list[Any], mode: str, estimator: Any) -> tuple[RLConfig, Method] | ConfigError:
    """Return the settings of a run and its method, or the error that refuses them."""
    config = RLConfig(reward_model="unused", algorithm="ppo", credit=chain, advantages=estimator, compare=[])
    config.sampling.stop, config.ppo.truncated, config.ppo.truncation_penalty = "eos", mode, -3.0
    try:
        return config, build_method(config)
    except ConfigError as error:
        return error


def batch_of(method: Method, seed: int) -> Rollouts:
    """Return two groups of four ragged rows with holes; half of the rows were cut off."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(8, 6, generator=generator) < 0.8
    mask[:, 0] = True
    names = sorted(method.needs | {"values", "bootstrap_values", "reference_logprobs"})
    group = torch.arange(8) // 4
    made = helpers.rollouts(mask, names, seed=seed, group=group, ended=torch.arange(8) % 2 == 0, dirty=False)
    share = {} if method.credit.share is None else {"credit_share": method.credit.share(made)}
    return made.with_evidence(**share)


@pytest.mark.parametrize(("name", "mode"), list(itertools.product(CREDITS, MODES)))
def test_every_credit_and_estimator_pays_a_cut_row_as_documented_or_is_refused(name: str, mode: str) -> None:
    for number, estimator in enumerate(ESTIMATORS):
        has_critic, built = number == 0, run_of(CREDITS[name], mode, estimator)
        if isinstance(built, ConfigError):
            if mode != "bootstrap":
                assert built.field in ("credit", "advantages"), built  # an estimator that loses where rewards land
            elif has_critic:
                first = CREDITS[name][0]
                refused = f"with {first if isinstance(first, str) else next(iter(first))}, which pays"
                assert name in SPREADS and built.field == "ppo.truncated" and refused in str(built), built
            continue
        assert mode != "bootstrap" or (has_critic and name not in SPREADS), (name, estimator)
        for seed in range(3):
            check_cut_rows(*built, batch_of(built[1], seed), mode)


def check_cut_rows(config: RLConfig, method: Method, plain: Rollouts, mode: str) -> None:
    assert plain.scores is not None and plain.ended is not None
    resolved = apply_truncation(plain, config.ppo)
    if mode != "bootstrap":  # no value stands for what would have followed
        kept = {k: v for k, v in resolved.evidence.items() if k != "bootstrap_values"}
        resolved = replace(resolved, evidence=kept)
    rewards, _ = credit.apply(method.credit, resolved)
    parts = segments.tokens()(resolved)
    estimated = method.estimate(rewards, parts, resolved)
    cut, sums = ~plain.ended, torch.where(plain.mask, rewards, 0.0).sum(dim=1)
    stands = {"penalty": -3.0, "bootstrap": 0.0}.get(mode)
    scores = plain.scores if stands is None else torch.where(cut, stands, plain.scores)
    over = replace(plain, scores=scores, ended=torch.ones(8, dtype=torch.bool))
    expected = torch.where(plain.mask, credit.apply(method.credit, over)[0], 0.0).sum(dim=1)
    if mode == "bootstrap" and "length_penalty" in str(method.specs):  # the value holds the cost of the length
        expected = torch.where(cut, expected + 0.5 * (plain.mask.sum(dim=1) - 2).clamp_min(0), expected)
    torch.testing.assert_close(sums, expected, rtol=1e-5, atol=1e-5)
    if "values" in method.estimate.needs:
        follows = torch.where(cut, plain.evidence["bootstrap_values"], 0.0) if mode == "bootstrap" else 0.0
        returns = estimated.returns.gather(1, plain.mask.int().argmax(dim=1)[:, None])[:, 0]
        torch.testing.assert_close(returns, sums + follows, rtol=1e-5, atol=1e-5)
    counted = make_targets(estimated, parts, resolved, config.ppo).policy_mask.any(dim=1)
    assert torch.equal(counted, plain.ended if mode == "mask" else plain.mask.any(dim=1))
