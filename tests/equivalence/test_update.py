"""The PPO update against one written out by hand from the paper: gradients, denominators, truncation, schedule."""

from __future__ import annotations

import copy
import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_runs
import torch
from torch import Tensor

from apportion import credit, losses
from apportion.config import OptimConfig, PPOConfig, RLConfig, ScoreConfig
from apportion.evidence import Models
from apportion.evidence.scoring import score
from apportion.masking import is_segment_start
from apportion.models.policy import Policy
from apportion.segments import build as build_segments
from apportion.stages.method import build_method
from apportion.stages.rl.learner import Learner, make_learner
from apportion.stages.rl.train import apply_truncation, train
from apportion.stages.rl.update import Targets, make_targets, update
from apportion.training.optimizer import learning_rate
from apportion.types import Advantages, Rollouts

NO_CLIP = OptimConfig(max_grad_norm=1e9)
ROUNDING = 4e-6  # log-probabilities of float32 logits are off by 1e-6, and ratios with them
CLIP = 0.1
LOSS = losses.ppo(clip=CLIP)
NEEDS = {"values", "reference_logprobs", "bootstrap_values"}


def ppo_config(**changes: Any) -> PPOConfig:
    """Return settings as `settle` leaves them for an estimator with a critic."""
    return PPOConfig(**{"epochs": 4, "whiten_advantages": True, "value_tokens": "first", **changes})


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_runs.world(tmp_path_factory.mktemp("world"))


def scene(world: Path, **changes: Any) -> tuple[Policy, Rollouts, Targets]:
    """Return a policy that has moved since it sampled, scored rollouts of unequal length, and random targets."""
    settings = {"sampling.stop": "eos", "policy": world / "ending", **changes}
    models = Models(tiny_runs.policy(world, stirred=False, **settings), tiny_runs.judge(world))
    torch.nn.init.normal_(models.policy.value_head.weight, std=0.1)
    batch = tiny_runs.sampled(models.policy, tiny_runs.prompts(8), seed=2, stop="eos", max_new_tokens=9)
    batch = score(models, batch, NEEDS, ScoreConfig())
    tiny_runs.stir(models.policy, 0.03)
    generator = torch.Generator().manual_seed(4)
    noise = torch.randn((2, *batch.mask.shape), generator=generator)
    targets = Targets(
        noise[0], noise[1], batch.mask, batch.mask, torch.where(batch.mask, batch.mask.cumsum(dim=1) - 1, -1)
    )
    assert batch.mask.sum(dim=1).unique().numel() > 2
    return models.policy, batch, targets


def gradients(policy: Policy, batch: Rollouts, targets: Targets, ppo: PPOConfig) -> tuple[list[list[Tensor]], Any]:
    """Return the gradients of each optimizer step of a real `update` that moves nothing, and its metrics."""
    optimizer = torch.optim.SGD(policy.trainable(), lr=0.0)
    seen: list[list[Tensor]] = []
    optimizer.register_step_pre_hook(
        lambda *_: seen.append([torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in policy.trainable()])
    )
    metrics = update(policy, optimizer, LOSS, batch, targets, ppo, NO_CLIP, torch.Generator().manual_seed(0))
    return seen, metrics


def by_hand(policy: Policy, batch: Rollouts, targets: Targets, rows: list[int], ppo: PPOConfig) -> list[Tensor]:
    """Return the gradient of one PPO step on `rows`, a row and a token at a time, in plain torch and float64."""
    policy = copy.deepcopy(policy)
    for module in (policy.model, policy.value_head, policy.value_trunk):
        if module is not None:
            module.double()
    policy_terms, value_terms = [], []
    for row in rows:
        prompt, response = tiny_runs.alone(batch, row)
        sequence = torch.tensor([prompt + response])
        out = policy.model(sequence, output_hidden_states=True)
        trunk = out.hidden_states[-1]
        if policy.value_trunk is not None:
            trunk = policy.value_trunk(sequence).last_hidden_state
        for t, token in enumerate(response):
            logits = out.logits[0, len(prompt) + t - 1] / policy.temperature
            allowed = torch.ones(400, dtype=torch.bool)
            allowed[policy.banned] = False
            logp = logits[token] - torch.logsumexp(logits[allowed], dim=0)
            ratio = torch.exp(logp - batch.old_logprobs[row, t])
            advantage = targets.advantages[row, t]
            if targets.policy_mask[row, t]:
                clipped = min(max(ratio, 1 - CLIP), 1 + CLIP)
                policy_terms.append(-min(ratio * advantage, clipped * advantage))
            value = policy.value_head(trunk[0, len(prompt) + t - 1]).squeeze()
            old, goal = batch.evidence["values"][row, t], targets.returns[row, t]
            if targets.value_mask[row, t]:
                near = old + min(max(value - old, -ppo.value_clip), ppo.value_clip)
                value_terms.append(0.5 * max((value - goal) ** 2, (near - goal) ** 2))
    loss = sum(policy_terms) / len(policy_terms) + ppo.value_coef * sum(value_terms) / len(value_terms)
    found = torch.autograd.grad(loss, policy.trainable(), allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(policy.trainable(), found, strict=True)]


def assert_same(found: list[Tensor], expected: list[Tensor], within: float = 1e-6) -> None:
    """Check that two gradients differ by no more than float32 does: `within` of their length, and in every entry."""
    one, two = (torch.cat([g.flatten().double() for g in gradient]) for gradient in (found, expected))
    assert two.norm() > 0.1
    assert (one - two).norm() <= within * two.norm()
    assert (one - two).abs().max() <= 2 * within * max(1.0, float(two.abs().max()))


KINDS = list(itertools.product((4, 0), ("shared", "separate"), (1.0, 0.8)))


@pytest.mark.parametrize(
    ("rank", "value_model", "temperature"),
    # every two of them together
    [kind if i in (0, 3, 5, 6) else pytest.param(*kind, marks=pytest.mark.long) for i, kind in enumerate(KINDS)],
)
def test_the_gradient_is_that_of_ppo_written_out_by_hand(
    world: Path, rank: int, value_model: str, temperature: float
) -> None:
    changes = {"lora.rank": rank, "ppo.value_model": value_model, "sampling.temperature": temperature}
    policy, batch, targets = scene(world, **changes)
    ppo = ppo_config(epochs=1, mini_batch=8, micro_batch=3, value_clip=0.05)
    [found], metrics = gradients(policy, batch, targets, ppo)
    assert 0.05 < metrics["policy/clipfrac"] < 0.95 and 0.05 < metrics["loss/value_clipfrac"] < 0.95
    assert_same(found, by_hand(policy, batch, targets, list(range(8)), ppo), ROUNDING)
    flat = torch.cat([g.flatten() for g in found])
    assert metrics["policy/grad_norm"] == pytest.approx(float(flat.norm()), rel=1e-5)


def test_each_mini_batch_is_divided_by_its_own_tokens_and_all_rows_come_once_an_epoch(world: Path) -> None:
    policy, batch, targets = scene(world)
    value_mask = batch.mask & (torch.arange(batch.mask.shape[1]) % 2 == 0)  # another count than the policy's tokens
    targets = targets._replace(value_mask=value_mask)
    ppo = ppo_config(epochs=2, mini_batch=3, micro_batch=2)
    found, _ = gradients(policy, batch, targets, ppo)
    generator = torch.Generator().manual_seed(0)
    orders = [torch.randperm(8, generator=generator) for _ in range(2)]
    assert not torch.equal(*orders), "the second epoch has no new order"
    rows = [part.tolist() for order in orders for part in order.split(3)]
    assert len(found) == len(rows) == 6
    for gradient, chosen in zip(found, rows, strict=True):
        assert_same(gradient, by_hand(policy, batch, targets, chosen, ppo), ROUNDING)


@pytest.mark.parametrize("rank", [4, 0])
def test_the_size_of_micro_batches_changes_no_gradient(world: Path, rank: int) -> None:
    policy, batch, targets = scene(world, **{"lora.rank": rank})
    whole = gradients(policy, batch, targets, ppo_config(epochs=1, mini_batch=8, micro_batch=8))
    for micro in (1, 3, 5):
        found, metrics = gradients(policy, batch, targets, ppo_config(epochs=1, mini_batch=8, micro_batch=micro))
        assert_same(found[0], whole[0][0], ROUNDING)
        assert metrics == pytest.approx(whole[1], rel=1e-4, abs=1e-6)


def test_padding_of_a_longer_batch_changes_no_gradient(world: Path) -> None:
    policy, batch, targets = scene(world)
    ppo = ppo_config(epochs=1, mini_batch=3, micro_batch=3)
    rows = batch.mask.sum(dim=1).argsort()[:3]
    longest = int(batch.mask[rows].sum(dim=1).max())
    assert longest < batch.mask.shape[1]
    padded = batch.select(rows)
    values = {k: v[:, :longest] if v.dim() > 1 else v for k, v in padded.evidence.items()}
    names = ("response_ids", "mask", "valid", "logprobs", "old_logprobs")
    cut = replace(padded, **{n: getattr(padded, n)[:, :longest] for n in names}, evidence=values)
    chosen = Targets(*(t[rows] for t in targets))
    one, _ = gradients(policy, padded, chosen, ppo)
    two, _ = gradients(policy, cut, Targets(*(t[:, :longest] for t in chosen)), ppo)
    assert_same(one[0], two[0])


def learner_of(world: Path, truncated: str, **changes: Any) -> tuple[Learner, Rollouts, RLConfig]:
    """Return a learner with values that are not 0, its first scored batch (some rows cut off), and its settings."""
    settings = {
        "algorithm": "ppo" if truncated == "bootstrap" else "abc",  # attention pays tokens by what a cut leaves out
        "policy": world / "ending",
        "sampling.stop": "eos",
        "sampling.batch_size": 16,
        "sampling.max_new_tokens": 6,
        "ppo.truncated": truncated,
        "ppo.truncation_penalty": -3.0,
        "log_rollouts": 16,
    }
    config = tiny_runs.config(world, **settings | changes)
    learner = make_learner(config, build_method(config))
    tiny_runs.stir(learner.models.policy)
    batch = tiny_runs.scored(learner)
    assert batch.ended.any() and not batch.ended.all()
    return learner, batch, config


def gae_by_hand(rewards: list[float], values: list[float], after: float) -> list[float]:
    out, running, following = [], 0.0, after
    for reward, value in zip(reversed(rewards), reversed(values), strict=True):
        running = reward + following - value + 0.95 * running
        out.append(running)
        following = value
    return out[::-1]


@pytest.mark.parametrize("truncated", ["terminal", "bootstrap", "mask", "penalty"])
def test_truncated_sets_the_value_of_a_response_without_eos(world: Path, truncated: str) -> None:
    learner, batch, _ = learner_of(world, truncated)
    policy = learner.models.policy
    after = policy.forward(batch).after.tolist()
    _, records = tiny_runs.one_batch(learner, 1, batch)
    for row, record in enumerate(records):
        ended = bool(batch.ended[row])
        assert record["ended"] == ended == (record["response_ids"][-1] == tiny_runs.EOS)
        paid = {"penalty": -3.0, "bootstrap": 0.0}.get(truncated, record["raw_score"])
        assert record["score"] == pytest.approx(record["raw_score"] if ended else paid, abs=1e-5)
        assert sum(record["credit"]) == pytest.approx(record["score"], abs=1e-5 * max(1, abs(record["score"])))
        follows = after[row] if truncated == "bootstrap" and not ended else 0.0
        assert abs(after[row]) > 1e-3
        expected = gae_by_hand(record["reward"], record["value"], follows)
        assert record["advantage"] == pytest.approx(expected, abs=1e-4)


def test_settling_changes_what_ended_and_nothing_else(world: Path) -> None:
    _, batch, _ = learner_of(world, "terminal")
    for truncated in ("terminal", "bootstrap", "mask", "penalty"):
        resolved = apply_truncation(batch, ppo_config(truncated=truncated, truncation_penalty=-3.0))
        kept = truncated in ("bootstrap", "mask")
        assert torch.equal(resolved.ended, batch.ended) if kept else resolved.ended.all()
        instead = {"penalty": -3.0, "bootstrap": 0.0}.get(truncated)
        expected = batch.scores if instead is None else torch.where(batch.ended, batch.scores, instead)
        assert torch.equal(resolved.scores, expected) and resolved.response_ids is batch.response_ids


def test_a_value_that_stands_for_what_would_come_is_not_paid_beside_the_score(world: Path) -> None:
    """A critic that is right everywhere leaves nothing to learn at a cut: V(s_T) alone is the return from there."""
    learner, batch, config = learner_of(world, "bootstrap")
    assert not batch.ended.all()
    worth = torch.linspace(-2.0, 2.0, len(batch))[:, None].expand(batch.mask.shape)
    known = {"values": torch.where(batch.mask, worth, 0.0), "bootstrap_values": worth[:, 0].clone()}
    resolved = apply_truncation(batch.with_evidence(**known), config.ppo)
    rewards, _ = credit.apply(credit.sparse(), resolved)
    found = learner.method.estimate(rewards, learner.method.segment(resolved), resolved).advantages
    cut = ~batch.ended
    torch.testing.assert_close(found[cut], torch.zeros_like(found[cut]), atol=1e-6, rtol=0)
    assert (found[batch.ended].abs().sum(dim=1) > 1e-3).all()


def test_masked_truncated_rows_have_no_gradient_and_count_nowhere(world: Path) -> None:
    policy, batch, _ = scene(world)
    ended = batch.mask.sum(dim=1) < 9
    assert ended.any() and not ended.all()
    batch = replace(batch, ended=ended)
    noise = torch.randn(batch.mask.shape, generator=torch.Generator().manual_seed(2)) * batch.mask
    segments = torch.where(batch.mask, batch.mask.cumsum(dim=1) - 1, -1)
    ppo = ppo_config(epochs=1, mini_batch=8, micro_batch=8, truncated="mask")
    targets = make_targets(Advantages(noise, noise), segments, batch, ppo)
    wild = torch.where(ended[:, None], noise, 1e6 * noise)
    one, _ = gradients(policy, batch, targets, ppo)
    two, _ = gradients(policy, batch, make_targets(Advantages(wild, wild), segments, batch, ppo), ppo)
    assert all(torch.equal(a, b) for a, b in zip(one[0], two[0], strict=True))
    kept = ended.nonzero().squeeze(1)
    alone = make_targets(Advantages(noise[kept], noise[kept]), segments[kept], batch.select(kept), ppo)
    three, _ = gradients(policy, batch.select(kept), alone, ppo)
    assert_same(one[0], three[0])


def test_a_mini_batch_in_which_nothing_counts_is_no_step(world: Path) -> None:
    """The weights, moments and metrics are those of the other mini-batches alone, in their order."""
    found = []
    for whole in (True, False):
        torch.manual_seed(0)  # adapters and value head are initialised from it
        policy, batch, targets = scene(world)
        counted = torch.arange(8) % 2 == 0
        targets = targets._replace(policy_mask=batch.mask & counted[:, None], value_mask=batch.mask & counted[:, None])
        optimizer = torch.optim.AdamW(policy.trainable(), lr=0.01)
        steps: list[int] = []
        optimizer.register_step_post_hook(lambda *_, steps=steps: steps.append(1))
        ppo = ppo_config(epochs=1, mini_batch=1, micro_batch=1)
        if whole:
            metrics = update(policy, optimizer, LOSS, batch, targets, ppo, NO_CLIP, torch.Generator().manual_seed(0))
        else:
            order = torch.randperm(8, generator=torch.Generator().manual_seed(0))
            each = []
            for row in order[counted[order]].split(1):
                mine = Targets(*(t[row] for t in targets))
                each.append(update(policy, optimizer, LOSS, batch.select(row), mine, ppo, NO_CLIP, torch.Generator()))
            metrics = {name: sum(one[name] for one in each) / len(each) for name in each[0]}
        assert len(steps) == 4
        moments = [t for state in optimizer.state.values() for t in state.values()]
        found.append((metrics, [*(p.detach().clone() for p in policy.trainable()), *moments]))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-6)
    assert found[0][0]["val/ratio"] > 0.5
    assert all(torch.equal(one, two) for one, two in zip(found[0][1], found[1][1], strict=True))


@pytest.mark.parametrize("once", [False, True])
def test_a_batch_in_which_nothing_counts_moves_nothing_and_leaves_its_metrics_out(world: Path, once: bool) -> None:
    changes: dict[str, Any] = (
        {"algorithm": "reinforce", "ppo.mini_batch": 16, "ppo.epochs": 1, "compare": "[sparse]"} if once else {}
    )
    learner, batch, _ = learner_of(world, "mask", **changes)
    assert learner.single_step == once
    tiny_runs.one_batch(learner, 1, batch)  # moments, whose momentum a step would follow
    policy, state = learner.policy, learner.optimizer.state
    before = [p.detach().clone() for p in policy.trainable()]
    moments = [t.clone() for one in state.values() for t in one.values()]
    assert moments
    metrics, records = tiny_runs.one_batch(learner, 2, replace(batch, ended=torch.zeros(len(batch), dtype=torch.bool)))
    assert all(torch.equal(a, b) for a, b in zip(before, policy.trainable(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(moments, (t for s in state.values() for t in s.values()), strict=True))
    assert not {"loss/policy", "loss/value", "val/ratio", "policy/approxkl", "policy/grad_norm"} & metrics.keys()
    assert not any(name.startswith("advantage/") for name in metrics)
    assert metrics["objective/entropy"] > 1 and metrics["objective/ended"] == 0 and len(records) == len(batch)
    assert all(value == value for value in metrics.values())


def test_a_batch_of_empty_responses_has_no_metric_that_is_no_number(world: Path) -> None:
    learner, batch, _ = learner_of(world, "terminal")
    none = torch.zeros_like(batch.mask)
    metrics, _ = tiny_runs.one_batch(learner, 1, replace(batch, mask=none, valid=none))
    assert metrics["objective/length"] == 0 and "loss/policy" not in metrics
    assert all(value == value for value in metrics.values())


def test_the_value_loss_counts_one_token_an_action(world: Path) -> None:
    _, batch, _ = scene(world)
    estimated = Advantages(torch.randn(batch.mask.shape), torch.randn(batch.mask.shape))
    segments = torch.where(batch.mask, (batch.mask.cumsum(dim=1) - 1) // 3, -1)
    targets = make_targets(estimated, segments, batch, ppo_config())
    lengths = batch.mask.sum(dim=1)
    assert targets.value_mask.sum(dim=1).tolist() == [-(-int(n) // 3) for n in lengths]
    assert torch.equal(targets.policy_mask, batch.mask) and torch.equal(is_segment_start(segments), targets.value_mask)
    white = targets.advantages[batch.mask]
    assert white.mean().abs() < 1e-5 and white.std() == pytest.approx(1.0, abs=1e-4)
    tokens = build_segments([("tokens", {})])(batch)
    assert torch.equal(make_targets(estimated, tokens, batch, ppo_config()).value_mask, batch.mask)


def test_the_learning_rate_rises_over_the_warm_up_and_falls_to_zero() -> None:
    config = OptimConfig(lr=1.0, warmup=0.2)
    rates = [learning_rate(config, step, 10) for step in range(11)]
    assert rates == pytest.approx([0.5, 1.0, 1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125, 0.0])
    without = [learning_rate(OptimConfig(lr=2.0, warmup=0.0), step, 4) for step in range(5)]
    assert without == pytest.approx([2.0, 2.0, 4 / 3, 2 / 3, 0.0])


def test_a_run_follows_the_schedule_and_logs_small_rates_exactly(world: Path, tmp_path: Path) -> None:
    changes = {"steps": 4, "optim.lr": 1.41e-5, "optim.warmup": 0.5, "log_rollouts": 0}
    run = train(tiny_runs.config(world, tmp_path / "run", **changes))
    logged = [row["policy/lr"] for row in tiny_runs.read_lines(run.path / "metrics.jsonl")]
    assert logged == pytest.approx([0.705e-5, 1.41e-5, 1.41e-5, 0.705e-5], rel=1e-5)


def test_models_of_a_learner_are_the_runs(world: Path) -> None:
    learner, _, config = learner_of(world, "mask")
    assert isinstance(learner.models, Models) and learner.models.policy.temperature == config.sampling.temperature
    rates = {group["eps"] for group in learner.optimizer.param_groups}
    assert rates == {1e-5} and not any(m.training for m in learner.models.policy.model.modules())


@pytest.mark.parametrize("group", [True, False])
def test_learning_once_needs_no_forward_before_it(world: Path, tmp_path: Path, group: bool) -> None:
    """One optimizer step a batch: the same run whether the old log-probabilities are the update's own or come before.

    A method that asks for the policy's values, attention or entropy still gets its pass.
    """
    changes: dict[str, Any] = {
        "algorithm": "grpo",
        "sampling.samples_per_prompt": 3,
        "ppo.epochs": 1,
        "ppo.mini_batch": 6,
    }
    if not group:
        changes |= {"sampling.samples_per_prompt": 1, "algorithm": "reinforce"}
    forwards, found = [], []
    for once in (True, False):
        config = tiny_runs.config(world, tmp_path / f"{once}", **changes, log_rollouts=0)
        learner = make_learner(config, build_method(config))
        assert learner.single_step
        learner.single_step = once
        seen: list[int] = []
        handle = learner.models.policy.model.register_forward_hook(lambda *_, seen=seen: seen.append(1))
        metrics = [tiny_runs.one_batch(learner, step)[0] for step in range(1, config.steps + 1)]
        handle.remove()
        forwards.append(len(seen))
        found.append((metrics, [p.detach().clone() for p in learner.models.policy.trainable()]))
    assert forwards[0] < forwards[1]
    for one, two in zip(*(f[0] for f in found), strict=True):
        assert one.keys() == two.keys()
        assert one == pytest.approx(two, rel=1e-4, abs=1e-6)
        assert one["sampling/logprob_gap"] < 1e-5 and one["objective/entropy"] > 1
    for one, two in zip(*(f[1] for f in found), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)
    for more in ({"ppo.epochs": 2}, {"ppo.mini_batch": 3}, {"segments": "entropy"}):
        config = tiny_runs.config(world, tmp_path / "more", **changes | more, log_rollouts=0)
        assert not make_learner(config, build_method(config)).single_step
