"""Checks of `apportion sft` and `apportion dpo` runs before training; they load no weights."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

from apportion.config import DPOConfig, SFTConfig
from apportion.errors import ConfigError, DataError, DiskError
from apportion.models.loading import context_of, pick_device, pick_dtype
from apportion.models.pretrained import generation_stops, load_settings
from apportion.models.text.targets import PairTarget
from apportion.stages.doctor import Case, Check, Finding, run_checks
from apportion.stages.doctor.checks import footprint, machine, tokens
from apportion.stages.doctor.findings import Result, fail, ok, skip, warn
from apportion.stages.doctor.rl import bad_row_counter, check, with_bad_rows
from apportion.stages.supervised.readers import check_loss, demonstrations, preference_pairs
from apportion.stages.supervised.rows import open_start

FEW_STEPS = 10
REPEATED = 0.01  # share of the rows that may repeat another


def open_loss(case: Case) -> Result:
    """The settings of the loss go together."""
    config = case.config
    if not isinstance(config, DPOConfig):
        what = "what follows the prompt" if config.completion_only else "every token"
        return ok(f"negative log-likelihood of {what}")
    check_loss(config)
    return ok(f"{config.loss}, beta {config.beta:g}, label smoothing {config.label_smoothing:g}")


def open_model(case: Case) -> Result:
    """The files of the model exist, its family can be trained, and it has a tokenizer with an end."""
    case.notes["start"] = start = open_start(case.config)
    case.policy_folder, case.tokenizer = start.folder, start.tokenizer
    case.policy_settings = load_settings("model", start.folder)
    case.context, case.stops = context_of(start.folder, "model"), generation_stops(start.folder)
    kind, words = case.policy_settings.model_type, len(start.tokenizer.get_vocab())
    ends = ", ".join(repr(start.tokenizer.convert_ids_to_tokens(i)) for i in start.ends)
    return ok(f"{case.config.model}: {kind}, context {case.context} tokens, vocabulary {words}; texts end at {ends}")


def chat_template(case: Case) -> Result:
    """The tokenizer has a chat template where rows are messages, which are refused without one."""
    if not case.tokenizer.chat_template:
        return skip("the tokenizer has none; rows of messages would be refused")
    return ok("the tokenizer has one; it renders rows of messages, and no others")


def open_rows(case: Case) -> Result:
    """The rows can be read and encoded, and some are held out."""
    config, bad = case.config, bad_row_counter(case.config)
    read: Any = preference_pairs if isinstance(config, DPOConfig) else demonstrations
    rows = read(config, case.notes["start"], bad)
    case.training, case.held_out = rows.training, rows.held_out
    message = f"{len(rows.training)} rows to train on, {len(rows.held_out)} held out"
    if rows.held_out:
        return with_bad_rows(ok(message), bad)
    return with_bad_rows(warn(message, "Nothing will be measured: name --test_data, or raise --held_out."), bad)


def row_lengths(case: Case) -> Result:
    """Rows are within max_length."""
    counts = [longest(row) for row in case.training or ()]
    middle = statistics.median(counts)
    return ok(f"{min(counts)} to {max(counts)} tokens (median {middle:g}), at most {case.config.max_length}")


def longest(row: Any) -> int:
    """Return the tokens of a row; of a pair those with its longer answer."""
    if isinstance(row, PairTarget):
        return len(row.prompt_ids) + max(len(row.chosen_ids), len(row.rejected_ids))
    return len(row.ids)


def targets(case: Case) -> Result:
    """Texts that are learned end with an end token, unless they were cut."""
    rows: list[Any] = list(case.training or ())
    ends = set(case.notes["start"].ends)
    if isinstance(case.config, DPOConfig):
        answers = [ids for row in rows for ids in (row.chosen_ids, row.rejected_ids)]
        longer = sum(len(row.chosen_ids) > len(row.rejected_ids) for row in rows)
        shorter = sum(len(row.chosen_ids) < len(row.rejected_ids) for row in rows)
        message = f"the chosen answer is longer in {longer} of {len(rows)} pairs, shorter in {shorter}"
    else:
        answers = [row.ids for row in rows]
        message = f"{sum(sum(row.mask) for row in rows)} of {sum(map(len, answers))} tokens are learned"
    without = sum(not ends.intersection(ids[-2:]) for ids in answers)  # a template may write a line break behind it
    message = f"{message}; {without} of {len(answers)} texts lack an end token"
    if without > 0.5 * len(answers):
        return warn(message, "The model may not learn to end: raise --max_length, or pass --overlong drop.")
    return ok(message)


def repeated(case: Case) -> Result:
    """Rows are distinct, and no held-out prompt is trained on."""
    training, held_out = case.training or (), case.held_out or ()
    again = len(training) - len(set(map(contents, training)))
    prompts = {row.key for row in training}
    both = sum(row.key in prompts for row in held_out)
    message = (
        f"{again} of {len(training)} rows repeat another; {both} of {len(held_out)} held-out prompts are trained on"
    )
    if both:
        return fail(message, "What is measured on them means nothing: take them out of test_data.")
    if again > REPEATED * len(training):
        return warn(message, "Drop the repeated rows: they have more weight.")
    return ok(message)


def contents(row: Any) -> tuple[tuple[int, ...], ...]:
    """Return the ids that make a row equal to another."""
    parts = (row.prompt_ids, row.chosen_ids, row.rejected_ids) if isinstance(row, PairTarget) else (row.ids,)
    return tuple(map(tuple, parts))


def steps(case: Case) -> Result:
    """There are enough rows for a number of optimizer steps."""
    config, count = case.config, len(case.training or ())
    total = config.steps or -(-count // config.batch_size) * config.epochs
    epochs = config.epochs if config.steps is None else total * config.batch_size / count
    message = f"{total} optimizer steps of {config.batch_size} rows, {epochs:.2g} passes over the rows"
    if getattr(config, "packing", False):
        message = f"{message}; fewer, as packing joins rows"
    if total < FEW_STEPS:
        return warn(message, "Few steps teach little: add rows or epochs, or lower --batch_size.")
    return ok(message)


def memory(case: Case) -> Result:
    """The estimated peak memory of the run fits into free memory."""
    device = pick_device(case.config.device)
    parts = estimate(case, pick_dtype(case.config.dtype, device).itemsize)
    fix = "Lower --micro_batch or --max_length, pass --gradient_checkpointing true, or train adapters (lora.rank 16)."
    return machine.fits(parts, sum(parts.values()), machine.free_memory(device), fix)


def estimate(case: Case, size: int) -> dict[str, float]:
    """Return bytes by part, `size` a number in the products; the Trainer computes all logits of a micro-batch."""
    config, shape = case.config, machine.policy_shape(case)
    full, pairs = config.lora.rank == 0, isinstance(config, DPOConfig)
    width = config.max_length if getattr(config, "packing", False) else max(map(longest, case.training or ()))
    positions = config.micro_batch * width * (2 if pairs else 1)
    block = positions * (8 * shape.hidden + 3 * shape.inner) * size
    borders = shape.layers * positions * shape.hidden * size
    return {
        "libraries": footprint.LIBRARIES,
        "model": float(shape.weights * (4 if full else size) * (2 if full and pairs else 1)),  # DPO's reference
        "optimizer": 12.0 * footprint.trainable(shape, config),
        "activations": float(block + borders if config.gradient_checkpointing else shape.layers * block),
        "logits": 12.0 * positions * shape.vocabulary,
    }


def disk(case: Case) -> Result:
    """The final model and the checkpoints fit on the disk of the output folder."""
    config, shape = case.config, machine.policy_shape(case)
    checkpoints = config.keep_checkpoints + 1 if config.checkpoint_every else 0
    return machine.room(config.output, 4.0 * shape.weights + 12.0 * footprint.trainable(shape, config) * checkpoints)


CHECKS: tuple[Check, ...] = (
    check("loss", open_loss, error=ConfigError),
    check("processor", machine.processor, error=ConfigError),
    check("model", open_model, opens=True),
    check("pad token", tokens.pad_token, "model"),
    check("chat template", chat_template, "model"),
    check("rows", open_rows, "model", error=DataError, opens=True),
    check("row tokens", row_lengths, "rows", error=DataError),
    check("targets", targets, "rows", error=DataError),
    check("repeated rows", repeated, "rows", error=DataError),
    check("steps", steps, "rows", error=ConfigError),
    check("memory", memory, "rows", "processor", error=ConfigError, estimate=True),
    check("disk", disk, "model", error=DiskError),
)


def check_supervised(
    config: SFTConfig | DPOConfig, *, threads: Any = None, on_check: Callable[[str], None] = lambda name: None
) -> list[Finding]:
    """Return the findings of all checks for `apportion sft` or `dpo` with these settings; see `rl.check_rl`."""
    return run_checks(Case(config, threads=threads), CHECKS, on_check)
