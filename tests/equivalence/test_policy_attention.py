"""ABC-D and ABC-D2 against the attention of each generation step, one step at a time: the mean, the authors' weights,
and responses with holes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import tiny_runs
import torch
from torch import Tensor

from apportion import Rollouts, credit
from apportion.evidence.policy import policy_evidence
from apportion.models.policy import Policy


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Policy:
    world = tiny_runs.world(tmp_path_factory.mktemp("world"))
    return tiny_runs.policy(world, **{"sampling.stop": "eos"})


def ragged() -> Rollouts:
    responses = [[50, 60, 70, 80, 90, 91], [33, 44, 55], [21, 22, 23, 24, tiny_runs.EOS], [7]]
    batch = tiny_runs.rollouts_of(tiny_runs.prompts(4), responses, extra=2)
    return replace(batch, scores=torch.tensor([2.0, -1.0, 0.5, 3.0]))


@torch.no_grad()
def steps_of(policy: Policy, prompt: list[int], response: list[int]) -> list[list[float]]:
    """Return, for each generation step, the last layer's head-mean attention to the response tokens before it."""
    policy.model.set_attn_implementation("eager")
    try:
        out = policy.model(torch.tensor([prompt + response]), output_attentions=True)
    finally:
        policy.model.set_attn_implementation("sdpa")
    rows = out.attentions[-1][0].double().mean(dim=0)
    return [rows[len(prompt) + j - 1, len(prompt) : len(prompt) + j].tolist() for j in range(len(response))]


def released(steps: list[list[float]], last_only: bool) -> list[float]:
    """Return the weights of the released code, which places the attention to token c at c + 1 and, over all steps,
    averages each place over the steps in which it is not 0."""
    size = len(steps)
    if last_only:
        weights = [0.0, *steps[-1]]
    else:
        weights = []
        for place in range(size):
            seen = [row[place - 1] for row in steps if place >= 1 and len(row) > place - 1]
            weights.append(sum(seen) / len(seen) if seen else 0.0)
    whole = sum(weights)
    return [w / whole for w in weights] if whole else [1 / size] * size


@pytest.mark.parametrize("view", ["mean", "last"])
def test_shifted_is_the_released_code(policy: Policy, view: str) -> None:
    batch, method = ragged(), credit.policy_attention(mix=1.0, view=view, shifted=True)
    rewards, _ = credit.apply(method, batch.with_evidence(**policy_evidence(policy, batch, method.needs)))
    for row, score in enumerate([2.0, -1.0, 0.5, 3.0]):
        prompt, response = tiny_runs.alone(batch, row)
        expected = released(steps_of(policy, prompt, response), view == "last")
        if len(response) > 1:
            assert expected[0] == 0 and len(set(expected)) == len(response)
        got = (rewards[row, : len(response)] / score).tolist()
        assert got == pytest.approx(expected, rel=0, abs=1e-6)


def test_the_plain_mean_is_over_all_steps(policy: Policy) -> None:
    batch, method = ragged(), credit.policy_attention(mix=1.0)
    rewards, _ = credit.apply(method, batch.with_evidence(**policy_evidence(policy, batch, method.needs)))
    for row, score in enumerate([2.0, -1.0, 0.5]):
        steps = steps_of(policy, *tiny_runs.alone(batch, row))
        weights = [sum(r[c] for r in steps if len(r) > c) for c in range(len(steps))]
        expected = [w / sum(weights) for w in weights]
        got = (rewards[row, : len(steps)] / score).tolist()
        assert got == pytest.approx(expected, rel=0, abs=1e-6) and got[-1] == 0


@pytest.mark.parametrize("attended", [True, False])
@pytest.mark.parametrize("view", ["mean", "last"])
def test_a_hole_keeps_the_mass_and_the_place_of_every_step(policy: Policy, view: str, attended: bool) -> None:
    """A tool's output gets no share; the share before it goes to the next sampled token. Attended to or not, every
    step's attention is that of the tokens that the model attends to, alone."""
    response, sampled = [50, 60, 301, 302, 70, 80], [True, True, False, False, True, True]
    batch = tiny_runs.rollouts_of([[5, 6, 7]], [response], extra=1)
    mask = torch.tensor([[*sampled, False]])
    valid = batch.mask if attended else mask
    batch = replace(batch, mask=mask, valid=valid, scores=torch.ones(1))
    seen = response if attended else [i for i, on in zip(response, sampled, strict=True) if on]
    places = [i for i, on in enumerate(sampled) if on] if attended else [0, 1, 2, 3]
    steps = steps_of(policy, [5, 6, 7], seen)
    mine = [[steps[j][c] for c in places if c < j] for j in places]
    for shifted in (True, False):
        method = credit.policy_attention(mix=1.0, view=view, shifted=shifted)
        rewards, _ = credit.apply(method, batch.with_evidence(**policy_evidence(policy, batch, method.needs)))
        if shifted:
            expected = released(mine, view == "last")
        else:
            rows = [mine[-1]] if view == "last" else mine
            weights = [sum(r[c] for r in rows if len(r) > c) for c in range(4)]
            expected = [w / sum(weights) for w in weights]
        assert rewards[mask].tolist() == pytest.approx(expected, rel=0, abs=1e-6)
        assert float(rewards.sum()) == pytest.approx(1.0, abs=1e-6)


def test_no_mass_is_lost_before_a_hole() -> None:
    """By hand: tokens 0, 1, 3, 5 of six; mean attention 4 2 1 0. Over later steps: 4·4/3, 2·4/2, 1·4/1, then moved."""
    mask = torch.tensor([[True, True, False, True, False, True]])
    mean = torch.tensor([[4.0, 2.0, 9.0, 1.0, 9.0, 0.0]])
    found = weights_of(mask, mean)
    moved = [0.0, 16 / 3, 0.0, 4.0, 0.0, 4.0]
    assert found[0].tolist() == pytest.approx([m / sum(moved) for m in moved], abs=1e-6)


def weights_of(mask: Tensor, mean: Tensor) -> Tensor:
    batch = tiny_runs.rollouts_of([[5]], [[6] * mask.shape[1]])
    batch = replace(batch, mask=mask, scores=torch.ones(1)).with_evidence(policy_attention_mean=mean)
    return credit.apply(credit.policy_attention(mix=1.0, shifted=True), batch)[0]
