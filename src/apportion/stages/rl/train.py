"""The reinforcement-learning loop: prompts are sampled into rollouts, scored, apportioned, cut into segments, turned
into advantages, and trained on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from apportion import credit
from apportion.config import PPOConfig, RLConfig, to_dict
from apportion.models.loading import locate
from apportion.models.saving import save_policy
from apportion.stages.method import build_method
from apportion.stages.rl.card import rl_card
from apportion.stages.rl.learner import Learner, make_learner
from apportion.stages.rl.metrics import batch_metrics
from apportion.stages.rl.rollout_log import rollout_records
from apportion.stages.rl.sources import check_shares, gather_batch
from apportion.stages.rl.update import make_targets
from apportion.training.monitoring import check_metrics, drop_nonfinite
from apportion.training.publish.card import write_card
from apportion.training.run_folder import RunFolder
from apportion.training.session import ProgressCallback, TrainingSession, saved_bytes, training_session
from apportion.types import Rollouts

MEMORY_SETTINGS = "ppo.micro_batch or ppo.micro_tokens"


def train(
    config: RLConfig,
    *,
    fresh: bool = False,
    on_step: ProgressCallback = lambda step, steps, metrics: None,
    warn: Callable[[str], None] = lambda line: None,
) -> RunFolder:
    """Train a policy as `config` says and return its finished run folder; an interrupted run is resumed.

    Under `accelerate launch` or `torchrun` the processes share the work, and the main one writes the folder.

    Args:
        on_step: called after each step with (step, steps, metrics).
        warn: called with one line for each warning of the preflight checks (`stages.doctor.rl.preflight`).

    Raises:
        ConfigError, ModelError, DataError, ScoreError, UserCodeError, MonitorError, DiskError: each names the fix.
        Interrupted: a signal ended it after a batch, with a checkpoint.
    """
    method = build_method(config)
    check_shares(config)
    settings = to_dict(config) | method.specs
    options: dict[str, Any] = {"fresh": fresh, "memory_settings": MEMORY_SETTINGS, "on_step": on_step}
    with training_session("rl", config, settings, **options) as session:
        assert session.run is not None
        if not session.finished:
            learner = session.load(lambda: make_learner(config, method, session.run, warn))
            for step in session.steps(config.steps):
                metrics, records = train_batch(session, learner, config, step)
                if learner.best is not None and learner.best.is_due(step):
                    with session.phase("held_out", has_collectives=True):
                        metrics |= learner.best.keep(session.run, step, settings)
                session.log(step, metrics, records)
            policy, base = learner.policy, locate("policy", config.policy)
            size = saved_bytes(policy.model)
            session.save_final(
                lambda folder: save_policy(policy, base, folder, settings),
                learner,
                size=size,
                evaluate=lambda part: describe(session, part, config, method.specs, len(learner.prompts.rows)),
            )
            session.run.write_status("finished", steps=config.steps)
        return session.run


def describe(session: TrainingSession, part: Path, config: RLConfig, specs: dict[str, Any], prompts: int) -> None:
    """Write the card of the policy in folder `part`."""
    assert session.run is not None
    card = rl_card(config, session.run, specs, prompts)
    settings = to_dict(config) | specs
    session.run.retry_when_full(lambda: write_card(part, card, config.policy, settings), 1 << 16)


def train_batch(
    session: TrainingSession, learner: Learner, config: RLConfig, step: int
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Train on one batch and return (metrics, rows for rollouts.jsonl).

    prompts -> rollouts -> scores -> rewards -> segments -> advantages -> update
    """
    method = learner.method
    with learner.policy.weights.unsharded():  # sharded weights are gathered once, to generate and to score
        with session.phase("generate"):
            rollouts = learner.source.take(step)  # ids, mask, logprobs (B,T)
        with session.phase("score", local=rollouts):
            if rollouts.scores is None:  # a source may deliver scored rollouts
                rollouts = learner.score(rollouts)  # scores (B,) and all evidence
    rollouts = learner.standardise_rewards(rollouts)
    with session.phase("credit", local=rollouts):
        rollouts = apply_truncation(rollouts, config.ppo)
        rewards, learner.credit_state = credit.apply(method.credit, rollouts, learner.credit_state)  # (B,T)
        segments = method.segment(rollouts)  # (B,T) action ids from 0, -1 off the mask
        rollouts = learner.add_credit_share(rollouts)
    # from here on every process has the whole batch, so that its statistics are those of one process
    rollouts, rewards, segments = gather_batch(
        rollouts, rewards, segments, learner.pad_token_id, config.ppo, learner.compare.logged
    )
    with session.phase("credit", batch=rollouts, columns={"reward": rewards}):
        estimated = method.estimate(rewards, segments, rollouts)  # advantages, returns (B,T)
    columns = {"reward": rewards, "advantage": estimated.advantages, "return": estimated.returns}
    with session.phase("update", batch=rollouts, columns=columns):
        targets = make_targets(estimated, segments, rollouts, config.ppo)
    with session.phase("update", batch=rollouts, columns=columns, has_collectives=True):
        metrics, rollouts = learner.update(rollouts, targets, step)
    with session.phase("log", batch=rollouts, columns=columns, metrics=metrics):
        records = rollout_records(learner, rollouts, rewards, estimated, step, config.log_rollouts)
        metrics |= batch_metrics(learner, rollouts, rewards, targets, config.scores)
        metrics |= learner.update_controllers(rollouts, rewards)
        metrics = drop_nonfinite(metrics, learner.monitoring.nonfinite.batch)
        check_metrics(step, metrics)
        metrics |= learner.monitoring.check(step, metrics, len(rollouts), learner.raise_kl_coef)
    return metrics, records


def apply_truncation(rollouts: Rollouts, config: PPOConfig) -> Rollouts:
    """Return the rollouts with truncated responses treated as `config.truncated` names.

    "terminal" counts them as ended; "penalty" replaces their score; "bootstrap" takes their score away, for which the
    critic's value after the last token stands (paying both would count it twice); "mask" leaves them to the update.
    Evidence "sampled_ended" (B,) bool keeps which responses ended by themselves.
    """
    if rollouts.ended is None:
        return rollouts
    rollouts = rollouts.with_evidence(sampled_ended=rollouts.ended)
    if config.truncated == "mask":
        return rollouts
    assert rollouts.scores is not None and rollouts.ended is not None
    if config.truncated == "bootstrap":
        return replace(rollouts, scores=torch.where(rollouts.ended, rollouts.scores, 0.0))
    ended = torch.ones_like(rollouts.ended)
    if config.truncated == "penalty":
        penalised = torch.where(rollouts.ended, rollouts.scores, config.truncation_penalty)
        return replace(rollouts, scores=penalised, ended=ended)
    return replace(rollouts, ended=ended)
