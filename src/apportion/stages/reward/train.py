"""The reward model: a 2-class classifier on excerpts of labelled texts, R = logit(positive) − logit(negative).

As in Chan et al. 2024 (arXiv 2402.00782) for IMDb; unlike them it trains on excerpts of random length, so that it
can score the short responses that a policy generates.
"""

from __future__ import annotations

import hashlib
import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from apportion.config import RewardConfig, to_dict
from apportion.data import BadRows
from apportion.data.bad_rows import leaving_out
from apportion.distributed import collectives
from apportion.distributed.launch import check_launch
from apportion.errors import ConfigError, DataError
from apportion.models.fast import use_packed_weights
from apportion.models.loading import (
    context_of,
    load_classifier,
    load_tokenizer,
    locate,
    pick_device,
    pick_dtype,
    use_fastest_attention,
)
from apportion.models.lora import add_adapter
from apportion.models.reward import STATISTICS
from apportion.models.saving import head_config, model_card, save_classifier
from apportion.models.text.render import check_embeddings
from apportion.stages.reward.evaluation import evaluate, token_ids
from apportion.stages.reward.excerpts import Excerpt, random_excerpts, right_pad, shuffled_batches
from apportion.stages.reward.learner import RewardLearner
from apportion.stages.reward.probe import probe_head
from apportion.training import rng
from apportion.training.monitoring import warn
from apportion.training.optimizer import learning_rate, zero_with_grad
from apportion.training.run_folder import RunFolder, require_space
from apportion.training.session import ProgressCallback, TrainingSession, saved_bytes, training_session

HEADS = ("score", "classifier")


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
        model, given = _prepare(run, config)
        inputs.append(given)
        sixteen_bit = config.lora.rank == 0 and pick_dtype(config.dtype, pick_device(config.device)) == torch.bfloat16
        return RewardLearner(model, config.optim, sixteen_bit=sixteen_bit, max_skipped=config.max_skipped)

    learner = session.load(make)
    [given] = inputs
    batches = shuffled_batches(given.excerpts, config.batch_size, config.seed)
    with nullcontext() if learner.is_sharded else use_packed_weights(learner.model):
        for step in session.steps(len(batches)):
            with session.phase("update", exchanges=True):
                metrics = train_batch(
                    learner, batches[step - 1], config, given.tokenizer.pad_token_id, step, len(batches)
                )
            session.log(step, metrics)
    evaluation: dict[str, Any] = {}
    session.save_final(
        lambda part: _save(learner, config, given, part),
        learner,
        size=saved_bytes(learner.model),
        evaluate=lambda part: evaluation.update(_evaluate(learner, run, config, given.test_rows, part)),
    )
    with collectives.error_barrier():
        if collectives.is_main():
            run.write_json("evaluation.json", evaluation)
            run.write_status("finished", accuracy=evaluation["accuracy"])


class Inputs(NamedTuple):
    """What a run trains and evaluates on.

    Attributes:
        excerpts: to train on. tokenizer, folder: of the model it starts from. test_rows: held-out rows.
    """

    excerpts: list[Excerpt]
    tokenizer: Any
    folder: str
    test_rows: list[Any]


def check_shares(config: RewardConfig) -> None:
    """Raise ConfigError for a launcher's request that would be ignored, and where a process would get no clip."""
    check_launch()
    if config.batch_size < collectives.launched():
        expected = f"at least {collectives.launched()}, an excerpt a process"
        raise ConfigError("batch_size", config.batch_size, expected, "Raise it, or launch fewer.")


def _prepare(run: RunFolder, config: RewardConfig) -> tuple[Any, Inputs]:
    """Return (model, inputs). Cheap checks come before the model."""
    with leaving_out(run.path, config.skip_bad_rows) as bad:
        train_rows, test_rows = read_data(config, bad)
    require_space(run.path, 800_000_000 if config.model == "smollm2" else 100_000_000)
    folder, device = locate("model", config.model), pick_device(config.device)
    tokenizer = load_tokenizer("model", folder, config.pad_token)
    context = context_of(folder, "model")
    if config.excerpt_tokens[1] > context:
        expected = f"at most the model's context of {context} tokens"
        raise ConfigError("excerpt_tokens", config.excerpt_tokens, expected, "Lower the second number.")
    excerpts = random_excerpts(
        *token_ids(train_rows, tokenizer, config), config.excerpts, config.excerpt_tokens, config.seed
    )
    rng.seed(config.seed)
    return _model(config, folder, tokenizer, device, excerpts), Inputs(excerpts, tokenizer, folder, test_rows)


def _save(learner: RewardLearner, config: RewardConfig, given: Inputs, folder: Path) -> None:
    """Write the model to `folder`."""
    card = model_card("Reward model", "reward-model", "R = logit(positive) − logit(negative).", to_dict(config))
    save_classifier(learner.model, given.tokenizer, given.folder, folder, card, lora=config.lora.rank > 0)


def _evaluate(
    learner: RewardLearner, run: RunFolder, config: RewardConfig, test_rows: list[Any], folder: Path
) -> dict[str, Any]:
    """Return the evaluation of the model in `folder`, and write the mean and sd of R there."""
    learner.release()
    evaluation = evaluate(folder, test_rows, config)
    statistics = json.dumps({"mean": evaluation["score_mean"], "sd": evaluation["score_sd"]})
    run.retry_when_full(lambda: (folder / STATISTICS).write_text(statistics), len(statistics))
    return evaluation


def read_data(config: RewardConfig, bad: BadRows | None = None) -> tuple[list[Any], list[Any]]:
    """Return (training rows, held-out rows) of (text, label). Raises DataError.

    A data set without held-out rows of its own keeps a fixed tenth by hash of the text.
    """
    from apportion.data import bucket, labelled

    if config.data == "imdb" and config.test_data is None:
        training, held_out = labelled("imdb", "reward_train"), labelled("imdb", "reward_test")
    elif config.test_data is not None:
        training = labelled(config.data, bad=bad)
        held_out = labelled(config.test_data, field="test_data", bad=bad)
    else:
        rows = labelled(config.data, bad=bad)
        training = [row for row in rows if bucket(row.text) >= 10]
        held_out = [row for row in rows if bucket(row.text) < 10]
        if not training or not held_out:
            fix = "Give more rows, or held-out ones of their own with --test_data."
            raise DataError("data", f"{len(rows)} rows", "enough to hold a tenth of them out", fix)
    if len({row.label for row in training}) < 2:
        got = f"{len(training)} training rows, all with label {training[0].label}"
        raise DataError("data", got, "rows of both labels", "Give texts of both kinds.")
    # files are often sorted by label: take the held-out texts in an order that their hash gives
    held_out = sorted(held_out, key=lambda row: hashlib.sha256(row.text.encode()).digest())
    return list(training), held_out[: config.test_texts]


def _model(config: RewardConfig, folder: str, tokenizer: Any, device: torch.device, excerpts: list[Excerpt]) -> Any:
    """Return the classifier to train: adapters and a float32 head over a 16-bit base, or all weights in float32."""
    lora = config.lora.rank > 0
    dtype = pick_dtype(config.dtype, device) if lora else torch.float32
    model: Any = load_classifier("model", folder, dtype, device, new_head=2, fast_kernels=config.fast_kernels)
    check_embeddings("model", model, tokenizer, (excerpt.ids for excerpt in excerpts))
    model.config.update(head_config(tokenizer))
    use_fastest_attention(model, device, config.excerpt_tokens[1])
    head = next(name for name, _ in model.named_children() if name in HEADS)
    if config.probe_excerpts:
        probe_head(model, model.get_submodule(head), excerpts[: config.probe_excerpts], tokenizer.pad_token_id)
    return add_adapter(model, config.lora, head=head).eval() if lora else model


def train_batch(
    learner: RewardLearner, batch: list[Excerpt], config: RewardConfig, pad: int, step: int, steps: int
) -> dict[str, float]:
    """Take one optimizer step on a batch and return its metrics; a step that is not finite is skipped and counted."""
    optimizer, weights, nonfinite = learner.optimizer, learner.weights, learner.nonfinite
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(config.optim, step - 1, steps)
    with collectives.error_barrier(), weights.relay_errors():
        sums = _accumulate(learner, batch, config.micro_batch, pad)
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


def _accumulate(learner: RewardLearner, batch: list[Excerpt], micro: int, pad: int) -> dict[str, Tensor]:
    """Add the gradient of this process's share of one batch, a few excerpts at a time, and return its part of the mean
    loss in nats and of the share of excerpts judged right."""
    model, everyone = learner.model, torch.arange(len(batch))
    device = next(model.parameters()).device
    total, hits = torch.zeros((), device=device), torch.zeros((), device=device)
    mine = collectives.shard(everyone)
    for part, counts in learner.weights.pad_micro_batches([*mine.split(micro)] if len(mine) else [], everyone[:1]):
        ids, mask, labels = (t.to(device) for t in right_pad([batch[i] for i in part.tolist()], pad))
        logits = model(input_ids=ids, attention_mask=mask.long()).logits.float()
        if not counts:
            zero_with_grad(logits).backward()
            continue
        loss = torch.nn.functional.cross_entropy(logits, labels, reduction="sum") / len(batch)
        loss.backward()
        total += loss.detach()
        hits += (logits.argmax(dim=1) == labels).sum() / len(batch)
    return {"loss/reward": total, "accuracy": hits}
