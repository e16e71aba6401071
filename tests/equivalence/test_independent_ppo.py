"""Token-level PPO written a second time, from ids and scores alone, by loops in float64: what our path must equal."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import tiny_runs
import torch
from torch import Tensor

from apportion import Rollouts, advantages, credit, losses, segments
from apportion.config import OptimConfig, PPOConfig, ScoreConfig
from apportion.evidence import Models
from apportion.evidence.scoring import score
from apportion.models.policy import Policy
from apportion.stages.rl.update import make_targets, update

KAPPA, GAMMA, LAMBDA = 0.2, 0.97, 0.9
CLIP = 0.15
SETTINGS = PPOConfig(
    epochs=1, mini_batch=8, micro_batch=3, value_clip=0.1, value_coef=0.3, whiten_advantages=True, value_tokens="first"
)
# one token an action, in any form
CUTS = {"tokens": segments.tokens, "ngrams": lambda: segments.ngrams(n=1)}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_runs.world(tmp_path_factory.mktemp("world"))


class Setup(NamedTuple):
    """The policy as it sampled, the policy that now learns, and the scored rollouts."""

    before: Policy
    now: Policy
    batch: Rollouts


@pytest.fixture(scope="module")
def scene(world: Path) -> Setup:
    changes = {"sampling.stop": "eos", "policy": world / "ending", "lora.rank": 0}
    now = tiny_runs.policy(world, stirred=False, **changes)
    torch.nn.init.normal_(now.value_head.weight, std=0.1)
    tiny_runs.stir(now, 0.01, seed=1)  # away from the reference
    for model in (now.model, now.reference):
        model.double().set_attn_implementation("sdpa")  # eager attention takes its softmax in float32
    batch = tiny_runs.sampled(now, tiny_runs.prompts(8), seed=2, stop="eos", max_new_tokens=9)
    before = copy.deepcopy(now)
    needs = {"values", "reference_logprobs", "bootstrap_values"}
    batch = score(Models(now, tiny_runs.judge(world)), batch, needs, ScoreConfig())
    tiny_runs.stir(now, 0.02)
    assert batch.ended.any() and not batch.ended.all() and batch.mask.sum(dim=1).unique().numel() > 2
    return Setup(before, now, batch)


# --- the second writing: nothing of ours is called below this line, up to the next ------------------------------------


class Ours(NamedTuple):
    """One row as plain lists, float64: log-probabilities and values (one more than tokens) of one model."""

    logprobs: list[Tensor]
    values: list[Tensor]


def read(model: Any, head: Any, prompt: list[int], response: list[int], banned: list[int]) -> Ours:
    """Return log π(a_t) and V before each token, and V after the last, of one row without padding."""
    out = model(torch.tensor([prompt + response]), output_hidden_states=True)
    logprobs, values = [], []
    keep = [v for v in range(out.logits.shape[-1]) if v not in banned]
    for t in range(len(response) + 1):
        at = len(prompt) + t - 1
        state = out.hidden_states[-1][0, at].double()
        values.append((state * head.weight[0].double()).sum() + head.bias[0].double())
        if t < len(response):
            logits = out.logits[0, at].double()
            top = logits[keep].max()
            total = (logits[keep] - top).exp().sum()
            logprobs.append(logits[response[t]] - top - total.log())
    return Ours(logprobs, values)


def advantages_of(rewards: list[float], values: list[float], after: float) -> list[float]:
    """Return GAE(γ, λ) of one row."""
    out: list[float] = []
    running, following = 0.0, after
    for t in reversed(range(len(rewards))):
        delta = rewards[t] + GAMMA * following - values[t]
        running = delta + GAMMA * LAMBDA * running
        out.insert(0, running)
        following = values[t]
    return out


class Found(NamedTuple):
    """What the second writing gives: lists of rows of floats, two losses, and the gradient by parameter."""

    rewards: list[list[float]]
    values: list[list[float]]
    advantages: list[list[float]]
    white: list[list[float]]
    returns: list[list[float]]
    policy_loss: Tensor
    value_loss: Tensor
    gradient: list[Tensor]


def second_writing(
    scene: Setup, texts: list[tuple[list[int], list[int]]], scores: list[float], ended: list[bool]
) -> Found:
    before, now = copy.deepcopy(scene.before), copy.deepcopy(scene.now)
    now.value_head.double()
    banned = [0]  # the pad token
    rewards, values, old, raw = [], [], [], []
    for (prompt, response), points, done in zip(texts, scores, ended, strict=True):
        with torch.no_grad():
            mine = read(before.model, before.value_head, prompt, response, banned)
            frozen = read(before.reference, before.value_head, prompt, response, banned)
        old.append([float(x) for x in mine.logprobs])
        values.append([float(v) for v in mine.values[:-1]])
        row = [-KAPPA * float(a - b) for a, b in zip(mine.logprobs, frozen.logprobs, strict=True)]
        row[-1] += points
        rewards.append(row)
        raw.append(advantages_of(row, values[-1], 0.0 if done else float(mine.values[-1])))
    returns = [[a + v for a, v in zip(x, y, strict=True)] for x, y in zip(raw, values, strict=True)]
    every = [a for row in raw for a in row]
    mean = sum(every) / len(every)
    scale = math.sqrt(sum((a - mean) ** 2 for a in every) / (len(every) - 1) + 1e-8)
    white = [[(a - mean) / scale for a in row] for row in raw]
    policy_loss, value_loss = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for i, (prompt, response) in enumerate(texts):
        mine = read(now.model, now.value_head, prompt, response, banned)
        for t in range(len(response)):
            ratio = torch.exp(mine.logprobs[t] - old[i][t])
            low, high = 1 - CLIP, 1 + CLIP
            held = ratio if low <= ratio.item() <= high else torch.tensor(min(max(ratio.item(), low), high)).double()
            policy_loss = policy_loss - min(ratio * white[i][t], held * white[i][t])
            move = mine.values[t] - values[i][t]
            near = move if abs(move.item()) <= SETTINGS.value_clip else math.copysign(SETTINGS.value_clip, move.item())
            plain = (mine.values[t] - returns[i][t]) ** 2
            value_loss = value_loss + 0.5 * max(plain, (values[i][t] + near - returns[i][t]) ** 2)
    policy_loss, value_loss = policy_loss / len(every), value_loss / len(every)
    gradient = torch.autograd.grad(policy_loss + SETTINGS.value_coef * value_loss, now.trainable())
    return Found(rewards, values, raw, white, returns, policy_loss, value_loss, list(gradient))


# --- ours -------------------------------------------------------------------------------------------------------------


def rows(x: Tensor, mask: Tensor) -> list[list[float]]:
    return [row[m].tolist() for row, m in zip(x, mask, strict=True)]


def near(got: list[list[float]], expected: list[list[float]]) -> None:
    one, two = (torch.tensor([v for row in x for v in row], dtype=torch.float64) for x in (got, expected))
    torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("cut", CUTS)
def test_our_path_is_token_ppo_written_a_second_time(scene: Setup, cut: str) -> None:
    batch, mask = scene.batch, scene.batch.mask
    texts = [tiny_runs.alone(batch, i) for i in range(len(batch))]
    found = second_writing(scene, texts, batch.scores.tolist(), batch.ended.tolist())

    method = credit.chain(credit.sparse(), credit.kl_penalty(coef=KAPPA))
    rewards, _ = credit.apply(method, batch)
    ids = CUTS[cut]()(batch)
    estimated = advantages.gae(GAMMA, LAMBDA)(rewards, ids, batch)
    targets = make_targets(estimated, ids, batch, SETTINGS)

    near(rows(batch.evidence["values"], mask), found.values)
    near(rows(rewards, mask), found.rewards)
    near(rows(estimated.advantages, mask), found.advantages)
    near(rows(targets.advantages, mask), found.white)
    near(rows(targets.returns, mask), found.returns)

    policy = copy.deepcopy(scene.now)
    seen: list[list[Tensor]] = []
    optimizer = torch.optim.SGD(policy.trainable(), lr=0.0)
    optimizer.register_step_pre_hook(lambda *_: seen.append([p.grad.clone() for p in policy.trainable()]))
    no_clip = OptimConfig(max_grad_norm=1e9)
    loss, chance = losses.ppo(clip=CLIP), torch.Generator().manual_seed(0)
    metrics = update(policy, optimizer, loss, batch, targets, SETTINGS, no_clip, chance)
    assert 0.05 < metrics["policy/clipfrac"] < 0.95 and 0.05 < metrics["loss/value_clipfrac"] < 0.95
    assert metrics["loss/policy"] == pytest.approx(found.policy_loss.item(), abs=1e-6)
    assert metrics["loss/value"] == pytest.approx(found.value_loss.item(), abs=1e-6, rel=1e-6)
    [gradient] = seen
    one, two = (torch.cat([g.flatten().double() for g in x]) for x in (gradient, found.gradient))
    assert two.norm() > 0.1
    assert (one - two).norm() <= 1e-6 * two.norm()
    assert (one - two).abs().max() <= 1e-6 * max(1.0, float(two.abs().max()))
