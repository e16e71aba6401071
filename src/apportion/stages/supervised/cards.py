"""Cards of the models that sft and dpo train."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from apportion.config import DPOConfig, SFTConfig, TrainerConfig
from apportion.training.publish.card import Card, rows_of
from apportion.training.publish.sources import Use

SFT_MEASURES = {
    "nll_before": "held-out loss before, nats a token",
    "nll_after": "held-out loss after, nats a token",
    "nll_change": "its change, paired by row",
    "perplexity_before": "held-out perplexity before",
    "perplexity_after": "held-out perplexity after",
}
DPO_MEASURES = {
    "accuracy": "held-out pairs ranked right by the implicit reward",
    "accuracy_reference": "the same by the start's log-probability alone",
    "margin": "margin of the implicit reward, nats",
    "reward_chosen": "implicit reward of chosen answers, nats",
    "reward_rejected": "implicit reward of rejected answers, nats",
    "loss": "held-out loss",
}
SAME_DATA = "The held-out rows are of the same data: the numbers say nothing about other prompts, languages or tasks."
NOT_JUDGED = "Nobody checked what it generates: it may be wrong, offensive or unsafe, as its base model and data are."


def sft_card(config: SFTConfig, evaluation: Mapping[str, Any], rows: int) -> Card:
    """Return the card of a fine-tuned model.

    Args:
        evaluation: what was measured, empty before it is. rows: that it was trained on.
    """
    counted = "what follows the prompt" if config.completion_only else "every token"
    return Card(
        title="Fine-tuned model",
        tag="sft",
        summary=f"A language model fine-tuned on {rows} demonstrations.",
        method=f"Supervised fine-tuning with TRL's SFTTrainer: the mean negative log-likelihood of {counted}; every "
        f"target ends with an end token. {trained_weights(config)}",
        data=uses(config, f"{rows} demonstrations", f"{evaluation.get('rows', 0)} demonstrations"),
        results=rows_of(evaluation, SFT_MEASURES),
        measured="Intervals are normal, over held-out rows.",
        limits=(SAME_DATA, "Likelihood is not quality: no person and no judge compared its answers.", NOT_JUDGED),
    )


def dpo_card(config: DPOConfig, evaluation: Mapping[str, Any], pairs: int) -> Card:
    """Return the card of a policy trained on pairs. Arguments as those of `sft_card`."""
    return Card(
        title="Policy",
        tag="dpo",
        summary=f"A policy trained on {pairs} preference pairs by direct preference optimisation ({config.loss}).",
        method=f"TRL's DPOTrainer with the {config.loss} loss, β = {config.beta:g}, label smoothing "
        f"{config.label_smoothing:g}; the reference is the model it started from. {trained_weights(config)}",
        data=uses(config, f"{pairs} pairs", f"{evaluation.get('pairs', 0)} pairs"),
        results=rows_of(evaluation, DPO_MEASURES),
        measured="Intervals are Wilson's for shares and normal for means, over held-out pairs.",
        limits=(
            SAME_DATA,
            "It learned what these annotators preferred, their errors and their taste for length included.",
            "Its accuracy is that of its implicit reward; what it generates may be better or worse than the start's.",
            NOT_JUDGED,
        ),
    )


def trained_weights(config: TrainerConfig) -> str:
    """Return which weights were trained, as a sentence."""
    if config.lora.rank == 0:
        return "All weights were trained."
    return f"Adapters of rank {config.lora.rank} were trained and merged in float32."


def uses(config: TrainerConfig, training: str, held_out: str) -> list[Use]:
    """Return the sources of a run with how much of each was used."""
    rows = [Use("training", config.data, config.split, training)]
    if config.test_data is None:
        return [*rows, Use("evaluation, held out of it by a hash of the prompt", config.data, config.split, held_out)]
    return [*rows, Use("evaluation", config.test_data, config.test_split, held_out)]
