"""The run that sft and dpo share: train with a Trainer, save, and evaluate the saved model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from apportion.config import TrainerConfig, to_dict
from apportion.models.saving import model_card, save_causal
from apportion.stages.supervised.rows import Start
from apportion.system.progress import activity
from apportion.training.publish.card import Card, write_card
from apportion.training.session import TrainingSession, saved_bytes
from apportion.training.trainer.run import quiet_trl, run_trainer


def train_and_evaluate(
    session: TrainingSession,
    config: TrainerConfig,
    start: Start,
    make: Callable[[], Any],
    names: Mapping[str, str],
    card: Callable[[Mapping[str, Any]], Card],
    evaluate: Callable[[str], dict[str, Any]],
) -> None:
    """Train with the Trainer that `make` makes, write final/ as the rl stage saves a policy, and evaluation.json.

    Args:
        names: {name in the Trainer's logs: our metric}. card: returns the model card, of what was measured.
        evaluate: returns what was measured of the model in a folder; the Trainer's memory is free by then.
    """
    assert session.run is not None
    run, settings = session.run, to_dict(config)
    evaluation: dict[str, Any] = {}
    held: list[Any] = []
    with quiet_trl():
        with activity("loading"):
            held.append(make())
        run_trainer(session, held[0], config, names)

    def save(folder: Path) -> None:
        first = card({})
        text = model_card(first.title, first.tag, first.summary, settings)
        save_causal(held[0].model, start.tokenizer, start.folder, folder, text, lora=config.lora.rank > 0)

    def measure(folder: Path) -> None:
        held.clear()
        with activity("evaluating"):
            evaluation.update(evaluate(str(folder)))
        run.retry_when_full(lambda: write_card(folder, card(evaluation), config.model, settings), 1 << 16)

    session.save_final(save, None, size=saved_bytes(held[0].model), evaluate=measure)
    run.write_json("evaluation.json", evaluation)
    run.write_status("finished", steps=session.total)
