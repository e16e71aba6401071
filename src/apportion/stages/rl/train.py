"""Reinforcement learning: prompts are sampled into rollouts, scored, apportioned, cut into segments, turned into
advantages, and learned from.

`train` is the loop; one batch can be followed from `experience` through `learn`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from apportion import credit
from apportion.config import PPOConfig, RLConfig, to_dict
from apportion.distributed import collectives
from apportion.evidence import Models, Users
from apportion.evidence.policy import POLICY
from apportion.evidence.scoring import ALWAYS, score
from apportion.generation import sample
from apportion.generation.prompts import PromptStream, load_prompts
from apportion.masking import masked_mean, whiten
from apportion.models.loading import context_of, load_tokenizer, locate, pick_device
from apportion.models.policy import load_policy
from apportion.models.reward import adjust, load_reward
from apportion.models.saving import save_policy
from apportion.models.text.render import check_embeddings
from apportion.models.text.token_spans import PolicyText
from apportion.registry import EvidenceKey
from apportion.segments import check as check_segments
from apportion.stages.doctor.checkup import quick
from apportion.stages.rl.learner import Learner
from apportion.stages.rl.method import build_method
from apportion.stages.rl.rollout_log import before_penalty, comparisons, rollout_records
from apportion.stages.rl.sources import check_shares, reseed, uniforms, whole_batch
from apportion.stages.rl.update import FirstPass, make_targets, update
from apportion.system.memory import memory_mb
from apportion.training import rng
from apportion.training.bad_rows import leaving_out
from apportion.training.crash_dump import ratios
from apportion.training.monitoring import Scene, check_metrics, check_rows, drop_unknown
from apportion.training.optimizer import learning_rate
from apportion.training.run_folder import Run, need_space
from apportion.training.session import bytes_of, keeping, open_run
from apportion.types import Method, Rollouts
from apportion.user_code import check_estimated, credit_in_time, in_time, means

Tell = Callable[[int, dict[str, float]], None]


def train(
    config: RLConfig,
    *,
    fresh: bool = False,
    tell: Tell = lambda step, metrics: None,
    warn: Callable[[str], None] = lambda line: None,
) -> Run:
    """Train a policy as `config` says and return its finished run folder; an interrupted run goes on where it was.

    Under `accelerate launch` or `torchrun` the processes share the work, and the main one writes the folder.

    Args:
        tell: called with the step and its metrics, for a progress bar.
        warn: called with a line for each thing that may not be meant (`stages.checkup.quick`).

    Raises:
        ConfigError, ModelError, DataError, ScoreError, DiskError: each names what to fix.
    """
    method = build_method(config)
    check_shares(config)
    collectives.start(pick_device(config.device))
    config_dict = to_dict(config) | method.specs
    run = open_run(config.output, "rl", config_dict, fresh=fresh)
    if collectives.broadcast_object(run.finished):
        return run
    with keeping(run, config) as keeper:
        with collectives.error_barrier():
            learner = make_learner(config, method)
            learner.monitors.run = run
            note_findings(run, learner, warn)
        learner.share_weights(keeper.end)
        start = keeper.resume(learner)
        policy = learner.models.policy
        collectives.broadcast(policy.weights.alike(policy.trainable()))
        for step, rollouts in experience(learner, config, start):
            began = time.perf_counter()
            metrics, records = learn(learner, rollouts, config, step)
            clock = {"time/update": time.perf_counter() - began, **learner.clock, "memory/rss_mb": memory_mb()}
            metrics |= collectives.all_reduce_max(clock)
            metrics["time/total"] = sum(metrics[k] for k in ("time/generate", "time/score", "time/update"))
            keeper.log(step, metrics, records)
            keeper.kept(step, config.steps)
            tell(step, metrics)
        base, size = locate("policy", config.policy), bytes_of(policy.model)
        keeper.final(
            lambda folder: save_policy(policy, base, folder, config_dict), wanted=size, ready=policy.make_whole
        )
        run.status("finished", steps=config.steps)
    return run


def experience(learner: Learner, config: RLConfig, start: int) -> Iterator[tuple[int, Rollouts]]:
    """Yield (step from 1, scored rollouts) for the steps after `start`; a queue can take its place.

    Each process samples and scores its own prompts of the batch, with all rollouts of each.
    """
    per_prompt = config.sampling.samples_per_prompt or 1
    for step in range(start + 1, config.steps + 1):
        began = time.perf_counter()
        prompts = learner.prompts.take(step, config.sampling.batch_size // per_prompt)
        mine, chance = collectives.shard_slice(len(prompts)), uniforms(config, learner.generator)
        reseed(learner.models.generator, config.seed, step)
        # a process that writes and reads waits for no other: weights that are kept in parts are whole here
        with learner.models.policy.weights.gathered(), collectives.error_barrier():
            rollouts = sample(learner.models.policy, prompts[mine], config.sampling, learner.generator, uniforms=chance)
            rollouts = replace(rollouts, group=rollouts.group + mine.start)
            sampled = time.perf_counter()
            asked = ALWAYS - POLICY if learner.once else ALWAYS
            learner.monitors.prepare(step, rollouts)
            with learner.monitors.keeping(step, rollouts, alone=True):
                rollouts = score(learner.models, rollouts, learner.needs, config.scores, asked)
        learner.clock = {"time/generate": sampled - began, "time/score": time.perf_counter() - sampled}
        yield step, rollouts


def learn(
    learner: Learner, rollouts: Rollouts, config: RLConfig, step: int
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Apportion the scores of one batch, learn from it, and return (metrics, what to log of the rollouts)."""
    method, monitors = learner.method, learner.monitors
    settled = apply_truncation(rollouts, config.ppo)
    with collectives.error_barrier(), monitors.keeping(step, rollouts, alone=True):
        rewards, learner.credit_state = credit.apply(method.credit, settled, learner.credit_state)  # (B,T)
        segments = method.segment(settled)  # (B,T) ids from 0, -1 off the mask
        check_segments(segments, rollouts.mask)
        check_rows("rewards", rewards, rollouts.mask)
        if "credit_share" in method.estimate.needs and method.credit.share is not None:
            settled = settled.with_evidence(credit_share=method.credit.share(settled))
    # from here on every process has the whole batch, so that its statistics are one process's
    ended = None if rollouts.ended is None else collectives.gather_rows(rollouts.ended)
    rollouts = whole_batch(settled, learner.models.policy.tokenizer.pad_token_id)
    rewards, segments = collectives.gather_rows(rewards), collectives.gather_rows(segments, fill=-1)
    if config.ppo.whiten_rewards:
        rewards = whiten(rewards, rollouts.mask, keep_mean=True)
    with monitors.keeping(step, replace(rollouts, ended=ended)) as scene:
        return learn_from(learner, Apportioned(rollouts, ended, rewards, segments), config, scene)


class Apportioned(NamedTuple):
    """A whole batch with its scores apportioned.

    Attributes:
        rollouts: settled by `apply_truncation`. ended: (B,) bool, which ended before that; None where it is not known.
        rewards: (B,T) float32. segments: (B,T) ids from 0, -1 off the mask.
    """

    rollouts: Rollouts
    ended: torch.Tensor | None
    rewards: torch.Tensor
    segments: torch.Tensor


def learn_from(
    learner: Learner, batch: Apportioned, config: RLConfig, scene: Scene
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Learn from the whole batch and return what `learn` does.

    Args:
        scene: told what becomes known of the batch, should the run stop in it.
    """
    rollouts, ended, rewards, segments = batch
    method, ppo, monitors, step = learner.method, config.ppo, learner.monitors, scene.step
    scene.columns |= {"reward": rewards}
    scene.later["credit"] = lambda sampled: before_penalty(learner, sampled)
    with collectives.error_barrier():  # a method of the user's may fail in one process alone
        estimated = method.estimate(rewards, segments, rollouts)  # advantages, returns (B,T)
        estimated = check_estimated(method.specs, estimated, rollouts.mask)
        scene.columns |= {"advantage": estimated.advantages, "return": estimated.returns}
        check_rows("advantages", estimated.advantages, rollouts.mask)
        check_rows("returns", estimated.returns, rollouts.mask)
    targets = make_targets(estimated, segments, rollouts, ppo)
    for group in learner.optimizer.param_groups:
        group["lr"] = learning_rate(config.optim, step - 1, config.steps)
    policy, chance = learner.models.policy, learner.generator
    first = FirstPass(*torch.zeros((2, *rollouts.mask.shape), device=policy.device)) if learner.once else None
    if not policy.weights.sharded:  # a process alone can read nothing with its part
        scene.later["ratio"] = lambda sampled: ratios(policy, sampled, ppo.micro_batch, ppo.micro_tokens)
    monitors.skips.begin()
    metrics = update(
        policy, learner.optimizer, method.loss, rollouts, targets, ppo, config.optim, chance, first, monitors.skips
    )
    scene.metrics = metrics
    rollouts = replace(rollouts, ended=ended)  # what is written down is what was sampled, however it was settled
    if first is not None:
        rollouts = replace(rollouts, old_logprobs=first.old_logprobs).with_evidence(entropy=first.entropy)
    scene.rollouts = rollouts
    with collectives.error_barrier():
        records = rollout_records(learner, rollouts, rewards, estimated, step, config.log_rollouts)
        metrics |= all_metrics(learner, batch._replace(rollouts=rollouts), config)
        metrics = drop_unknown(metrics, monitors.skips.batch)
        check_metrics(step, metrics)
        return metrics | monitors.look(step, metrics, len(rollouts), learner.raise_kl_coef), records


def all_metrics(learner: Learner, batch: Apportioned, config: RLConfig) -> dict[str, float]:
    """Return what there is to tell of a batch beside its update, and move the controllers."""
    rollouts, ended, rewards, segments = batch
    method, metrics = learner.method, dict[str, float]()
    if hasattr(method.estimate, "stats"):
        metrics |= means(method.specs, "advantages", method.estimate.stats(rewards, segments, rollouts))
    metrics |= batch_metrics(rollouts, rewards, segments) | learner.move_controllers(rollouts, rewards)
    metrics |= {"policy/lr": learner.optimizer.param_groups[0]["lr"]}
    if config.scores.clip is not None and rollouts.scores is not None:
        held = rollouts.scores.abs() >= config.scores.clip * (1 - 1e-6)
        metrics["objective/scores_clipped"] = float(held.float().mean())
    return metrics | ({} if ended is None else {"objective/ended": float(ended.float().mean())})


def apply_truncation(rollouts: Rollouts, config: PPOConfig) -> Rollouts:
    """Return the rollouts with responses that were cut off treated as `config.truncated` names.

    "terminal" says that they ended; "penalty" replaces their score; "bootstrap" takes their score away, which the
    critic's value after the last token stands for (paying both would count it twice); "mask" leaves them to the update.
    """
    if rollouts.ended is None or config.truncated == "mask":
        return rollouts
    if config.truncated == "bootstrap":
        assert rollouts.scores is not None
        return replace(rollouts, scores=torch.where(rollouts.ended, rollouts.scores, 0.0))
    ended = torch.ones_like(rollouts.ended)
    if config.truncated == "penalty":
        assert rollouts.scores is not None
        penalised = torch.where(rollouts.ended, rollouts.scores, config.truncation_penalty)
        return replace(rollouts, scores=penalised, ended=ended)
    return replace(rollouts, ended=ended)


def batch_metrics(rollouts: Rollouts, rewards: torch.Tensor, segments: torch.Tensor) -> dict[str, float]:
    """Return one batch's metrics: raw scores, rewards, KL (nats a sequence), entropy, length, actions, fallbacks."""
    raw, lengths = rollouts.evidence["raw_scores"], rollouts.mask.sum(dim=1).float()
    reference = rollouts.evidence.get("reference_logprobs")
    found = {
        "objective/scores": raw.mean(),
        "objective/scores_std": raw.std(unbiased=False),
        "objective/rewards": rewards.sum(dim=1).mean(),
        "objective/entropy": masked_mean(rollouts.evidence["entropy"], rollouts.mask),
        "objective/length": lengths.mean(),
        "segments/actions": (segments.amax(dim=1) + 1).float().mean(),
        "sampling/logprob_gap": masked_mean((rollouts.logprobs - rollouts.old_logprobs).abs(), rollouts.mask),
    }
    if "phrase_fallback" in rollouts.evidence:
        found["segments/fallback_rate"] = rollouts.evidence["phrase_fallback"].mean()
    if reference is not None:
        kl = torch.where(rollouts.mask, rollouts.logprobs - reference, 0.0).sum(dim=1)
        found["objective/kl"] = kl.mean()
    return {k: float(v) for k, v in found.items()}


def make_learner(config: RLConfig, method: Method) -> Learner:
    """Return everything that a run holds: models, prompts, optimizer, states. Cheap checks come before models."""
    rng.seed(config.seed)
    need_space(Path(config.output).expanduser(), 200_000_000)
    folder, judge = locate("policy", config.policy), locate("reward_model", config.reward_model)
    with leaving_out(Path(config.output).expanduser(), config.skip_bad_rows) as bad:
        texts = load_prompts(config.prompts, "rl", bad)
    tokenizer = load_tokenizer("policy", folder, config.pad_token)
    stream = PromptStream(texts, tokenizer, config.sampling, config.seed, context_of(folder))
    findings = quick(config, folder, tokenizer, texts, stream.rows)
    reads = PolicyText(tokenizer, stream.conversations)
    settings: dict[str, Any] = {"dtype": config.reward_dtype, "device": config.device, "pad_token": config.pad_token}
    settings["fast_kernels"] = config.fast_kernels
    reward = load_reward(judge, **settings, policy=reads)  # it reads ids where it shares the tokenizer, else text
    adjust(torch.zeros(1), reward, config.scores)  # asks for statistics that may not be there
    policy = load_policy(config, reward)
    check_embeddings("policy", policy.model, tokenizer, stream.rows)
    users = Users(config.monitors.timeout)
    method = in_time(method, users)
    compared = comparisons(config.compare) if config.log_rollouts else {}
    compare = {name: credit_in_time([name], one, users) for name, one in compared.items()}
    needs = method.needs | {"reference_logprobs"}
    needs |= frozenset[str]().union(*(c.needs for c in compare.values()))
    needs |= {"bootstrap_values"} if config.ppo.truncated == "bootstrap" else set()
    generator = torch.Generator(device=policy.device).manual_seed(config.seed)
    # while they score, processes draw unlike amounts: with several, each has a generator of its own for that
    own = generator if collectives.world_size() == 1 else torch.Generator(device=policy.device)
    models = Models(policy, reward, method.segment, config.sampling, own, config.scores, users=users)
    once = single_step_on_policy(config, needs)
    return Learner(models, method, stream, needs, generator, config.optim, compare, once, config.monitors, findings)


def note_findings(run: Run, learner: Learner, warn: Callable[[str], None]) -> None:
    """Write what the run's own check-up warned of into status.json, and say it."""
    if learner.findings:
        run.know(doctor=[{"name": one.name, "found": one.found, "fix": one.fix} for one in learner.findings])
    for one in learner.findings:
        warn(f"warning: {one.name}: {one.found}. {one.fix}")


def single_step_on_policy(config: RLConfig, needs: frozenset[str]) -> bool:
    """Whether one optimizer step learns from the whole batch and nothing else asks what the policy says before it.

    The update's own forward then gives the old log-probabilities, and one forward of the policy a batch is saved.
    """
    one_step = (config.ppo.epochs or 1) == 1 and config.ppo.mini_batch >= config.sampling.batch_size
    return one_step and collectives.world_size() == 1 and not {EvidenceKey.of(name).name for name in needs} & POLICY
