"""The reward model: a 2-class classifier on excerpts of labelled texts, R = logit(positive) − logit(negative).

As in Chan et al. 2024 (arXiv 2402.00782) for IMDb; it departs from them in cutting excerpts of random length, so that
it can judge the short text that a policy writes.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from apportion.config import RewardConfig, to_dict
from apportion.data import BadRows
from apportion.distributed import collectives
from apportion.distributed.launch import check_launch
from apportion.errors import ConfigError, DataError
from apportion.intervals import calibration, mean_interval, proportion
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
from apportion.models.master_weights import to_sixteen_bit
from apportion.models.reward import STATISTICS, RewardModel, load_reward
from apportion.models.saving import head_config, model_card, save_classifier
from apportion.models.text.render import check_embeddings
from apportion.stages.reward.excerpts import Excerpt, batches, random_excerpts, right_pad, tokenized
from apportion.stages.reward.learner import RewardLearner
from apportion.stages.reward.probe import probe_head
from apportion.system.memory import memory_mb
from apportion.training import rng
from apportion.training.bad_rows import leaving_out
from apportion.training.monitoring import announce
from apportion.training.optimizer import learning_rate, nothing
from apportion.training.run_folder import Run, need_space
from apportion.training.session import TrainingSession, bytes_of, keeping, open_run

Tell = Callable[[int, int, dict[str, float]], None]
LENGTHS = (10, 20, 40, 80)  # tokens of the held-out excerpts that accuracy is also reported for
BY_LENGTH = 500  # texts for each of them
HEADS = ("score", "classifier")


def train(config: RewardConfig, *, fresh: bool = False, tell: Tell = lambda step, steps, metrics: None) -> Run:
    """Train, save and evaluate a reward model as `config` says; return its finished run folder.

    final/ holds float32 weights and reward.json with the mean and sd of R on held-out excerpts. Under `accelerate
    launch` or `torchrun` the processes share every batch; the main one writes and evaluates.

    Raises:
        ConfigError, ModelError, DataError, DiskError: each names what to fix.
    """
    check_shares(config)
    collectives.start(pick_device(config.device))
    run = open_run(config.output, "reward", to_dict(config), fresh=fresh)
    if collectives.broadcast_object(run.finished):
        return run
    with keeping(run, config) as keeper:
        with collectives.error_barrier():
            model, excerpts, tokenizer, folder, test_rows = _prepare(run, config)
        collectives.broadcast(p for p in model.parameters() if p.requires_grad)
        learner = RewardLearner(model, _halved(model, config), config.optim, config.max_skipped)
        del model
        learner.share_weights(keeper.end)
        start = keeper.resume(learner)
        with nullcontext() if learner.parted else use_packed_weights(learner.model):
            _fit(learner, start, excerpts, config, tokenizer.pad_token_id, keeper, tell)
        found: dict[str, Any] = {}
        keeper.final(
            lambda part: _save(learner, config, tokenizer, folder, part),
            lambda part: found.update(_judged(learner, run, config, test_rows, part)),
            bytes_of(learner.model),
            ready=learner.make_whole,
        )
        with collectives.error_barrier():
            if collectives.is_main():
                run.write_json("evaluation.json", found)
                run.status("finished", accuracy=found["accuracy"])
    return run


def check_shares(config: RewardConfig) -> None:
    """Raise ConfigError for a launcher's request that would be ignored, and where a process would get no clip."""
    check_launch()
    if config.batch_size < collectives.launched():
        expected = f"at least {collectives.launched()}, an excerpt a process"
        raise ConfigError("batch_size", config.batch_size, expected, "Raise it, or launch fewer.")


def _prepare(run: Run, config: RewardConfig) -> tuple[Any, list[Excerpt], Any, str, list[Any]]:
    """Return (model, training excerpts, tokenizer, its folder, held-out rows). Cheap checks come before the model."""
    with leaving_out(run.path, config.skip_bad_rows) as bad:
        train_rows, test_rows = read_data(config, bad)
    need_space(run.path, 800_000_000 if config.model == "smollm2" else 100_000_000)
    folder, device = locate("model", config.model), pick_device(config.device)
    tokenizer = load_tokenizer("model", folder, config.pad_token)
    context = context_of(folder, "model")
    if config.excerpt_tokens[1] > context:
        expected = f"at most the model's context of {context} tokens"
        raise ConfigError("excerpt_tokens", config.excerpt_tokens, expected, "Lower the second number.")
    excerpts = random_excerpts(
        *_ids(train_rows, tokenizer, config), config.excerpts, config.excerpt_tokens, config.seed
    )
    rng.seed(config.seed)
    return _model(config, folder, tokenizer, device, excerpts), excerpts, tokenizer, folder, test_rows


def _halved(model: Any, config: RewardConfig) -> dict[torch.nn.Parameter, Tensor]:
    """Let all weights learn in 16 bit over float32 masters, where they learn and the processor has it."""
    device = next(model.parameters()).device
    full = config.lora.rank == 0 and pick_dtype(config.dtype, device) == torch.bfloat16
    return to_sixteen_bit(model) if full else {}


def _save(learner: RewardLearner, config: RewardConfig, tokenizer: Any, base: str, folder: Path) -> None:
    """Write the model to `folder`."""
    card = model_card("Reward model", "reward-model", "R = logit(positive) − logit(negative).", to_dict(config))
    save_classifier(learner.model, tokenizer, base, folder, card, lora=config.lora.rank > 0)


def _judged(
    learner: RewardLearner, run: Run, config: RewardConfig, test_rows: list[Any], folder: Path
) -> dict[str, Any]:
    """Return what `evaluate` found of the model in `folder`, and put the mean and sd of R there."""
    learner.release()
    found = evaluate(folder, test_rows, config)
    statistics = json.dumps({"mean": found["score_mean"], "sd": found["score_sd"]})
    run.patiently(lambda: (folder / STATISTICS).write_text(statistics), len(statistics))
    return found


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


def _ids(rows: Sequence[Any], tokenizer: Any, config: RewardConfig) -> tuple[list[list[int]], list[int]]:
    texts = [row.text for row in rows]
    return tokenized(texts, tokenizer, config.excerpt_tokens[1]), [row.label for row in rows]


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


def _fit(
    learner: RewardLearner,
    start: int,
    excerpts: list[Excerpt],
    config: RewardConfig,
    pad: int,
    keeper: TrainingSession,
    tell: Tell,
) -> None:
    """Train on every clip once, from the batch after `start`."""
    optimizer, weights = learner.optimizer, learner.weights
    dealt = batches(excerpts, config.batch_size, config.seed)
    for step, batch in enumerate(dealt[start:], start + 1):
        began = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config.optim, step - 1, len(dealt))
        with collectives.error_barrier(), weights.waiting():
            sums = _accumulate(learner, batch, config.micro_batch, pad)
        learning = weights.summed(learner.trainable)
        norm = weights.norm(learning)
        learner.skips.begin()
        if learner.skips.allow(sums["loss/reward"], norm, torch.arange(len(batch))):
            torch.nn.utils.clip_grads_with_norm_(learning, config.optim.max_grad_norm, norm)
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        skipped = learner.skips.batch
        if skipped:  # its numbers are those of nothing that was learned
            announce(f"monitor max_skipped at step {step}: updates skipped as not finite: {skipped}")
            metrics = {}
        else:
            metrics = {name: float(total) for name, total in collectives.all_reduce_sum(sums).items()}
            metrics |= {"grad_norm": float(norm)}
        metrics |= {"lr": optimizer.param_groups[0]["lr"], "monitors/skipped_updates": float(skipped)}
        metrics |= collectives.all_reduce_max({"time/total": time.perf_counter() - began, "memory/rss_mb": memory_mb()})
        keeper.log(step, metrics)
        keeper.kept(step, len(dealt))
        tell(step, len(dealt), metrics)


def _accumulate(learner: RewardLearner, batch: list[Excerpt], micro: int, pad: int) -> dict[str, Tensor]:
    """Add the gradient of this process's share of one batch, a few excerpts at a time, and return its part of the mean
    loss in nats and of the share of excerpts judged right."""
    model, everyone = learner.model, torch.arange(len(batch))
    device = next(model.parameters()).device
    total, hits = torch.zeros((), device=device), torch.zeros((), device=device)
    mine = collectives.shard(everyone)
    for part, counts in learner.weights.even([*mine.split(micro)] if len(mine) else [], everyone[:1]):
        ids, mask, labels = (t.to(device) for t in right_pad([batch[i] for i in part.tolist()], pad))
        logits = model(input_ids=ids, attention_mask=mask.long()).logits.float()
        if not counts:
            nothing(logits).backward()
            continue
        loss = torch.nn.functional.cross_entropy(logits, labels, reduction="sum") / len(batch)
        loss.backward()
        total += loss.detach()
        hits += (logits.argmax(dim=1) == labels).sum() / len(batch)
    return {"loss/reward": total, "accuracy": hits}


def evaluate(folder: Path, rows: Sequence[Any], config: RewardConfig) -> dict[str, Any]:
    """Return accuracy with its interval, by clip length too, calibration, and mean and sd of R, on held-out texts."""
    loading: dict[str, Any] = {"dtype": config.dtype, "device": config.device, "fast_kernels": config.fast_kernels}
    reward = load_reward(str(folder), **loading, field="model")
    ids, labels = _ids(rows, reward.tokenizer, config)
    excerpts = random_excerpts(ids, labels, len(rows), config.excerpt_tokens, config.seed + 1)
    scores, truth = scored(reward, excerpts), [c.label for c in excerpts]
    probabilities = torch.sigmoid(scores).tolist()
    bins, error = calibration(probabilities, truth)
    by_length = {}
    for length in LENGTHS:
        if length > config.excerpt_tokens[1]:
            continue
        cut = [Excerpt(row[:length], label) for row, label in zip(ids[:BY_LENGTH], labels[:BY_LENGTH], strict=True)]
        by_length[str(length)] = accuracy(scored(reward, cut), [c.label for c in cut])
    return {
        "accuracy": accuracy(scores, truth),
        "by_length": by_length,
        "calibration": bins,
        "ece": error,
        "score_mean": float(scores.mean()),
        "score_sd": float(scores.std(unbiased=False)),
        "score_interval": mean_interval(scores.tolist()),
        "texts": len(rows),
        "excerpt_tokens": list(config.excerpt_tokens),
    }


def scored(reward: RewardModel, excerpts: Sequence[Excerpt], batch_size: int = 32) -> Tensor:
    """Return R (N,) float32 of the excerpts, on the CPU, computed in batches of like length."""
    out = torch.zeros(len(excerpts))
    order = sorted(range(len(excerpts)), key=lambda i: len(excerpts[i].ids))
    device = next(reward.model.parameters()).device
    for first in range(0, len(order), batch_size):
        chosen = order[first : first + batch_size]
        ids, mask, _ = right_pad([excerpts[i] for i in chosen], reward.model.config.get_text_config().pad_token_id)
        out[chosen] = reward.score(ids.to(device), mask.to(device))[0].cpu()
    return out


def accuracy(scores: Tensor, labels: Sequence[int]) -> dict[str, float]:
    """Return {mean, low, high} of how often R > 0 says the label."""
    hits = int(((scores > 0).long() == torch.tensor(labels)).sum())
    return proportion(hits, len(labels))
