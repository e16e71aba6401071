"""The reward model: a 2-class classifier on excerpts of labelled texts, R = logit(positive) − logit(negative).

As in Chan et al. 2024 (arXiv 2402.00782) for IMDb; unlike them it trains on excerpts of random length, so that it
can score the short responses that a policy generates. From preference pairs it learns R by the Bradley–Terry loss.
From rankings of whole completions it learns R as the one logit of its head, each completion computed once a step and
the mean subtracted at the end, as in Ouyang et al. 2022 (arXiv 2203.02155).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from apportion.config import PreferenceConfig, RewardConfig, to_dict
from apportion.distributed import collectives, launcher
from apportion.distributed.launch import check_launch
from apportion.errors import ConfigError
from apportion.models.fast import use_packed_weights
from apportion.models.loading import pick_device, pick_dtype
from apportion.stages.reward.excerpts import Excerpt, ExcerptPair, RankedExcerpts, flat, right_pad, shuffled_batches
from apportion.stages.reward.final import evaluate_final, save_reward
from apportion.stages.reward.inputs import Inputs, prepare
from apportion.stages.reward.learner import RewardLearner
from apportion.stages.reward.losses import MeanLoss, micro_batches
from apportion.training.monitoring import warn
from apportion.training.optimizer import learning_rate, zero_with_grad
from apportion.training.run_folder import RunFolder
from apportion.training.session import ProgressCallback, TrainingSession, saved_bytes, training_session

Batch = Sequence[Excerpt | ExcerptPair | RankedExcerpts]


def train(
    config: RewardConfig,
    *,
    fresh: bool = False,
    on_step: ProgressCallback = lambda step, steps, metrics: None,
) -> RunFolder:
    """Train, save and evaluate a reward model as `config` says; return its finished run folder.

    final/ holds float32 weights and reward.json with the mean and sd of R on held-out excerpts. Under `accelerate
    launch` or `torchrun` the processes share every batch; the main one writes and evaluates.

    Args:
        on_step: called after each step with (step, steps, metrics).

    Raises:
        ConfigError, ModelError, DataError, DiskError: each names the fix.
    """
    check_shares(config)
    with training_session("reward", config, to_dict(config), fresh=fresh, on_step=on_step) as session:
        assert session.run is not None
        if not session.finished:
            _train(session, session.run, config)
        return session.run


def _train(session: TrainingSession, run: RunFolder, config: RewardConfig) -> None:
    """Train on every excerpt once, save, and evaluate."""
    inputs: list[Inputs] = []

    def make() -> RewardLearner:
        model, given = prepare(run, config)
        inputs.append(given)
        sixteen_bit = config.lora.rank == 0 and pick_dtype(config.dtype, pick_device(config.device)) == torch.bfloat16
        return RewardLearner(model, config.optim, sixteen_bit=sixteen_bit, max_skipped=config.max_skipped)

    learner = session.load(make)
    [given] = inputs
    batches: list[Batch] = []
    for epoch in range(config.preferences.epochs if given.ranked else 1):
        batches += shuffled_batches(given.excerpts, config.batch_size, config.seed + epoch)
    with nullcontext() if learner.is_sharded else use_packed_weights(learner.model):
        for step in session.steps(len(batches)):
            with session.phase("update", has_collectives=True):
                pad, batch = given.tokenizer.pad_token_id, batches[step - 1]
                metrics = train_batch(learner, batch, config, pad, step, len(batches))
            session.log(step, metrics)
    evaluation: dict[str, Any] = {}
    session.save_final(
        lambda part: save_reward(learner.model, config, given, part),
        learner,
        size=saved_bytes(learner.model),
        evaluate=lambda part: evaluation.update(evaluate_final(learner, run, config, given, part)),
    )
    with collectives.error_barrier():
        if collectives.is_main():
            run.write_json("evaluation.json", evaluation)
            run.write_status("finished", accuracy=evaluation["accuracy"])


def check_shares(config: RewardConfig) -> None:
    """Raise ConfigError for a launcher's request that would be ignored, and where a process would get no clip."""
    check_launch()
    if config.batch_size < launcher.launched():
        expected = f"at least {launcher.launched()}, an excerpt a process"
        raise ConfigError("batch_size", config.batch_size, expected, "Raise it, or launch fewer.")


def train_batch(
    learner: RewardLearner, batch: Batch, config: RewardConfig, pad: int, step: int, steps: int
) -> dict[str, float]:
    """Take one optimizer step on a batch and return its metrics; a step that is not finite is skipped and counted."""
    optimizer, weights, nonfinite = learner.optimizer, learner.weights, learner.nonfinite
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(config.optim, step - 1, steps)
    with collectives.error_barrier(), weights.relay_errors():
        sums = _accumulate(learner, batch, config.micro_batch, pad, config.preferences)
    learning = weights.reduce_gradients(learner.trainable)
    norm = weights.gradient_norm(learning)
    nonfinite.begin()
    if nonfinite.allow(sums["loss/reward"], norm, torch.arange(len(batch))):
        torch.nn.utils.clip_grads_with_norm_(learning, config.optim.max_grad_norm, norm)
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    skipped, metrics = nonfinite.batch, dict[str, float]()
    if skipped:  # the metrics of its forward describe nothing that was trained on
        warn(f"monitor max_skipped at step {step}: updates skipped as not finite: {skipped}")
    else:
        metrics = {name: float(total) for name, total in collectives.all_reduce_sum(sums).items()}
        metrics |= {"grad_norm": float(norm)}
    return metrics | {"lr": optimizer.param_groups[0]["lr"], "monitors/skipped_updates": float(skipped)}


def _accumulate(
    learner: RewardLearner, batch: Batch, micro: int, pad: int, preferences: PreferenceConfig | None = None
) -> dict[str, Tensor]:
    """Add the gradient of this process's share of one batch, a few excerpts, pairs or rankings at a time, and return
    its part of the mean loss in nats and of the share of them (of rankings, of their pairs) judged right."""
    model, everyone = learner.model, torch.arange(len(batch))
    device = next(model.parameters()).device
    total, hits = torch.zeros((), device=device), torch.zeros((), device=device)
    mean_loss = MeanLoss(batch, preferences or PreferenceConfig())
    parts = micro_batches(batch, collectives.shard(everyone), micro)
    for part, counts in learner.weights.pad_micro_batches(parts, everyone[:1]):
        chosen = [batch[i] for i in part.tolist()]
        ids, mask, labels = (t.to(device) for t in right_pad(flat(chosen), pad))
        logits = model(input_ids=ids, attention_mask=mask.long()).logits.float()
        if not counts:
            zero_with_grad(logits).backward()
            continue
        loss, right = mean_loss(logits, labels, chosen)
        loss.backward()
        total += loss.detach()
        hits += right
    return {"loss/reward": total, "accuracy": hits}
