"""Supervised fine-tuning: demonstrations as ids, TRL's SFTTrainer inside a run folder, held-out log-likelihood."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from apportion.config import SFTConfig, to_dict
from apportion.data.bad_rows import leaving_out
from apportion.intervals import mean_interval
from apportion.models.loading import pick_device, pick_dtype
from apportion.models.text.targets import Target
from apportion.stages.supervised.cards import sft_card
from apportion.stages.supervised.model import check_packing, load_model
from apportion.stages.supervised.readers import demonstrations
from apportion.stages.supervised.rows import Start, open_start
from apportion.stages.supervised.run import train_and_evaluate
from apportion.stages.supervised.scoring import answer_logprobs, counted_tokens
from apportion.system.progress import activity
from apportion.training.run_folder import RunFolder
from apportion.training.session import ProgressCallback, TrainingSession, training_session
from apportion.training.trainer.run import arguments_of

METRICS = {
    "loss": "loss/sft",
    "mean_token_accuracy": "accuracy/tokens",
    "entropy": "entropy",
    "grad_norm": "grad_norm",
    "learning_rate": "lr",
    "num_tokens": "tokens",
}
IGNORED = -100  # the label of a token that the loss does not count


def train(
    config: SFTConfig,
    *,
    fresh: bool = False,
    on_step: ProgressCallback = lambda step, steps, metrics: None,
) -> RunFolder:
    """Fine-tune a model on demonstrations as `config` says; return its finished run folder.

    The loss is the mean negative log-likelihood of the target tokens of a batch, in nats. An interrupted run is resumed
    from the trainer's checkpoint, to the same loss curve.

    Args:
        on_step: called after each step with (step, steps, metrics).

    Raises:
        ConfigError, ModelError, DataError, ScoreError, DiskError: each names the fix.
        Interrupted: a signal ended it after a step, with a checkpoint.
    """
    with training_session("sft", config, to_dict(config), fresh=fresh, on_step=on_step) as session:
        assert session.run is not None
        if not session.finished:
            _train(session, session.run, config)
        return session.run


def _train(session: TrainingSession, run: RunFolder, config: SFTConfig) -> None:
    with activity("loading"), leaving_out(run.path, config.skip_bad_rows) as bad:
        start = open_start(config)
        rows = demonstrations(config, start, bad)
    train_and_evaluate(
        session,
        config,
        start,
        lambda: make_trainer(config, run, start, rows.training),
        METRICS,
        lambda evaluation: sft_card(config, evaluation, len(rows.training)),
        lambda folder: evaluate(config, start, rows.held_out, folder) | {"training_rows": len(rows.training)},
    )


def make_trainer(config: SFTConfig, run: RunFolder, start: Start, rows: Sequence[Target]) -> Any:
    """Return TRL's SFTTrainer on the ids of `rows`, which it does not tokenise, render or cut again.

    Raises as `load_model` and `check_packing`.
    """
    from datasets import Dataset
    from trl import SFTConfig as Arguments
    from trl import SFTTrainer

    device = pick_device(config.device)
    arguments = Arguments(
        **arguments_of(config, run, device, pick_dtype(config.dtype, device)),
        max_length=config.max_length if config.packing else None,
        packing=config.packing,
    )
    model, adapters = load_model(config, start)
    if config.packing:
        check_packing(model)
    labels = [[i if on else IGNORED for i, on in zip(row.ids, row.mask, strict=True)] for row in rows]
    table = Dataset.from_dict({"input_ids": [row.ids for row in rows], "labels": labels})
    return SFTTrainer(
        model, args=arguments, train_dataset=table, processing_class=start.tokenizer, peft_config=adapters
    )


def evaluate(config: SFTConfig, start: Start, rows: list[Target], trained: str) -> dict[str, Any]:
    """Return the held-out negative log-likelihood of the model before and after training, in nats a token.

    `nll_before` and `nll_after` are means over rows, with 95% intervals; `nll_change` is that of the rows' differences.
    Perplexities are over all target tokens.
    """
    counts = [counted_tokens(row) for row in rows]
    scored = [i for i, count in enumerate(counts) if count]
    if not scored:
        return {"rows": 0}
    chosen, tokens = [rows[i] for i in scored], [counts[i] for i in scored]
    sums = {name: answer_logprobs(folder, chosen, config, start).tolist() for name, folder in _models(start, trained)}
    each = {name: [-s / n for s, n in zip(values, tokens, strict=True)] for name, values in sums.items()}
    change = [after - before for before, after in zip(each["before"], each["after"], strict=True)]
    return {
        **{f"nll_{name}": mean_interval(values) for name, values in each.items()},
        "nll_change": mean_interval(change),
        **{f"perplexity_{name}": math.exp(-sum(values) / sum(tokens)) for name, values in sums.items()},
        "rows": len(chosen),
        "tokens": sum(tokens),
    }


def _models(start: Start, trained: str) -> tuple[tuple[str, str], tuple[str, str]]:
    return ("before", start.folder), ("after", trained)
