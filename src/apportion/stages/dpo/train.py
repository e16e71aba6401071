"""Direct preference optimisation: pairs as ids, TRL's DPOTrainer inside a run folder, held-out accuracy."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch

from apportion.config import DPOConfig, to_dict
from apportion.data.bad_rows import leaving_out
from apportion.intervals import mean_interval, proportion
from apportion.losses import dpo
from apportion.models.loading import pick_device, pick_dtype
from apportion.models.text.targets import PairTarget, Target
from apportion.stages.supervised.cards import dpo_card
from apportion.stages.supervised.model import load_model
from apportion.stages.supervised.readers import check_loss, preference_pairs
from apportion.stages.supervised.rows import Start, open_start
from apportion.stages.supervised.run import train_and_evaluate
from apportion.stages.supervised.scoring import answer_logprobs, counted_tokens
from apportion.system.progress import activity
from apportion.training.run_folder import RunFolder
from apportion.training.session import ProgressCallback, TrainingSession, training_session
from apportion.training.trainer.run import arguments_of

METRICS = {
    "loss": "loss/dpo",
    "rewards/accuracies": "accuracy/pairs",
    "rewards/margins": "rewards/margins",
    "rewards/chosen": "rewards/chosen",
    "rewards/rejected": "rewards/rejected",
    "logps/chosen": "logps/chosen",
    "logps/rejected": "logps/rejected",
    "entropy": "entropy",
    "grad_norm": "grad_norm",
    "learning_rate": "lr",
    "num_tokens": "tokens",
}
ROBUST = 0.25  # ε of TRL's "robust" loss in `loss_of`; any number below 0.5 gives the same sum


def train(
    config: DPOConfig,
    *,
    fresh: bool = False,
    on_step: ProgressCallback = lambda step, steps, metrics: None,
) -> RunFolder:
    """Train a policy on preference pairs as `config` says; return its finished run folder.

    The reference is the model that training starts from: under adapters the model with them disabled, else a copy. An
    interrupted run is resumed from the trainer's checkpoint, to the same loss curve.

    Args:
        on_step: called after each step with (step, steps, metrics).

    Raises:
        ConfigError, ModelError, DataError, ScoreError, DiskError: each names the fix.
        Interrupted: a signal ended it after a step, with a checkpoint.
    """
    check_loss(config)
    with training_session("dpo", config, to_dict(config), fresh=fresh, on_step=on_step) as session:
        assert session.run is not None
        if not session.finished:
            _train(session, session.run, config)
        return session.run


def _train(session: TrainingSession, run: RunFolder, config: DPOConfig) -> None:
    with activity("loading"), leaving_out(run.path, config.skip_bad_rows) as bad:
        start = open_start(config)
        rows = preference_pairs(config, start, bad)
    train_and_evaluate(
        session,
        config,
        start,
        lambda: make_trainer(config, run, start, rows.training),
        METRICS,
        lambda evaluation: dpo_card(config, evaluation, len(rows.training)),
        lambda folder: evaluate(config, start, rows.held_out, folder) | {"training_pairs": len(rows.training)},
    )


def loss_of(config: DPOConfig) -> dict[str, Any]:
    """Return TRL's settings of the loss.

    TRL's "sigmoid" ignores label smoothing. Its "robust" loss is ((1−ε')·s − ε'·s̄)/(1−2ε') with s = −log σ(βh) and
    s̄ = −log σ(−βh), so that at ε' = ¼ the sum (1+2ε)·sigmoid − 2ε·robust is (1−ε)·s + ε·s̄, the smoothed loss.
    """
    epsilon = config.label_smoothing
    if not epsilon:
        return {"loss_type": [config.loss], "beta": config.beta}
    weights = [1.0 + 2.0 * epsilon, -2.0 * epsilon]
    return {
        "loss_type": ["sigmoid", "robust"],
        "loss_weights": weights,
        "label_smoothing": ROBUST,
        "beta": config.beta,
    }


def make_trainer(config: DPOConfig, run: RunFolder, start: Start, rows: Sequence[PairTarget]) -> Any:
    """Return TRL's DPOTrainer on the ids of `rows`.

    It takes texts, which it would render and tokenise in its own way: it is made on one pair, and then given the ids of
    all pairs, in the columns that its own preparation makes.

    Raises as `load_model`.
    """
    from datasets import Dataset
    from trl import DPOConfig as Arguments
    from trl import DPOTrainer

    device = pick_device(config.device)
    dtype = pick_dtype(config.dtype, device)
    arguments = Arguments(**arguments_of(config, run, device, dtype), **loss_of(config), max_length=None)
    model, adapters = load_model(config, start)
    trainer = DPOTrainer(
        model,
        ref_model=None if adapters is not None else copy.deepcopy(model).requires_grad_(False),
        args=arguments,
        train_dataset=Dataset.from_list([{"prompt": start.tokenizer.eos_token, "chosen": "a", "rejected": "b"}]),
        processing_class=start.tokenizer,
        peft_config=adapters,
    )
    columns = ("prompt_ids", "chosen_ids", "rejected_ids")
    trainer.train_dataset = Dataset.from_dict({c: [getattr(row, c) for row in rows] for c in columns})
    return trainer


def evaluate(config: DPOConfig, start: Start, pairs: list[PairTarget], trained: str) -> dict[str, Any]:
    """Return how the trained policy ranks held-out pairs, by its implicit reward β·(log π − log π_ref).

    Accuracy is the share of pairs whose chosen answer has the higher reward, `accuracy_reference` that of the
    reference's own log-probability; margins are in nats. All with 95% intervals.
    """
    if not pairs:
        return {"pairs": 0}
    answers = [answer_of(pair, pair.chosen_ids) for pair in pairs]
    answers += [answer_of(pair, pair.rejected_ids) for pair in pairs]
    policy, reference = (answer_logprobs(folder, answers, config, start) for folder in (trained, start.folder))
    sums = (*policy.chunk(2), *reference.chunk(2))
    if config.loss == "ipo":  # a token, as TRL's loss
        tokens = torch.tensor([counted_tokens(one) for one in answers], dtype=torch.float64).chunk(2)
        losses = dpo(*(x / n for x, n in zip(sums, (*tokens, *tokens), strict=True)), beta=config.beta, kind="ipo")
    else:
        losses = dpo(*sums, beta=config.beta, label_smoothing=config.label_smoothing)
    rewards = (config.beta * (policy - reference)).chunk(2)
    margins = rewards[0] - rewards[1]
    return {
        "accuracy": proportion(int((margins > 0).sum()), len(pairs)),
        "accuracy_reference": proportion(int((sums[2] > sums[3]).sum()), len(pairs)),
        "margin": mean_interval(margins.tolist()),
        "reward_chosen": mean_interval(rewards[0].tolist()),
        "reward_rejected": mean_interval(rewards[1].tolist()),
        "loss": float(losses[0] / losses[1]),
        "pairs": len(pairs),
    }


def answer_of(pair: PairTarget, ids: list[int]) -> Target:
    """Return the row of a pair's prompt and one of its answers, of which the answer counts."""
    return Target(pair.prompt_ids + ids, [False] * len(pair.prompt_ids) + [True] * len(ids), pair.key)
