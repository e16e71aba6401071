"""`apportion sft` and `dpo` give the weights of TRL's own trainers, made by hand on the raw rows with the same seed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_runs
import torch
import trainer_runs
from datasets import Dataset
from peft import LoraConfig
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from apportion.cli.arguments import parse
from apportion.config import DPOConfig, SFTConfig
from apportion.stages.dpo import train as dpo
from apportion.stages.sft import train as sft
from apportion.stages.supervised.readers import preference_pairs
from apportion.training.trainer.run import quiet_trl

LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj"]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trainer_runs.world(tmp_path_factory.mktemp("world"))


def by_hand(kind: str, world: Path, rows: list[dict[str, Any]], output: Path, lora: bool, **more: Any) -> Any:
    """Return TRL's trainer after training on the raw rows, with TRL's own loading, rendering and tokenisation."""
    import trl

    with quiet_trl():
        arguments = getattr(trl, f"{kind}Config")(
            output_dir=str(output),
            use_cpu=True,
            bf16=False,
            seed=7,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            num_train_epochs=1,
            learning_rate=0.01,
            max_length=64,
            gradient_checkpointing=False,
            report_to=[],
            disable_tqdm=True,
            save_strategy="no",
            logging_steps=1,
            **more,
        )
        model = AutoModelForCausalLM.from_pretrained(world / "base", dtype=torch.float32)
        settings = LoraConfig(r=4, lora_alpha=32, lora_dropout=0.0, target_modules=LAYERS) if lora else None
        trainer = getattr(trl, f"{kind}Trainer")(
            model,
            args=arguments,
            train_dataset=Dataset.from_list(rows),
            processing_class=AutoTokenizer.from_pretrained(world / "base"),
            peft_config=settings,
        )
        trainer.train()
    return trainer


def merged(trainer: Any, lora: bool) -> dict[str, Tensor]:
    model = trainer.model.merge_and_unload() if lora else trainer.model
    return {name: value.detach() for name, value in model.named_parameters()}


def assert_same(run: Path, trainer: Any, lora: bool, loss: str) -> None:
    losses = [row[loss] for row in tiny_runs.read_lines(run / "metrics.jsonl")]
    theirs = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert losses == pytest.approx(theirs, rel=1e-6) and len(losses) == 4
    ours, expected = tiny_runs.weights(run / "final"), merged(trainer, lora)
    assert ours.keys() == expected.keys()
    start = tiny_runs.weights(Path(trainer.model.config.name_or_path))
    assert any((start[name] - expected[name]).abs().max() > 1e-3 for name in ours), "nothing was trained"
    for name, value in expected.items():
        torch.testing.assert_close(ours[name], value, rtol=0, atol=1e-6)


@pytest.mark.parametrize("lora", [True, False], ids=["adapters", "all weights"])
@pytest.mark.parametrize("rows", ["demonstrations", "chats"])
def test_sft_is_trls(world: Path, tmp_path: Path, rows: str, lora: bool) -> None:
    changes = {"lora.rank": 4 if lora else 0, "seed": 7}
    flags = trainer_runs.flags(world, world / f"{rows}.jsonl", tmp_path / "run", **changes)
    run = sft.train(parse(SFTConfig, "sft", flags).config).path
    trainer = by_hand("SFT", world, getattr(trainer_runs, rows)(), tmp_path / "trl", lora)
    assert_same(run, trainer, lora, "loss/sft")


@pytest.mark.parametrize("lora", [True, False], ids=["adapters", "all weights"])
@pytest.mark.parametrize("rows", ["pairs", "chat_pairs"])
def test_dpo_is_trls(world: Path, tmp_path: Path, rows: str, lora: bool) -> None:
    changes = {"lora.rank": 4 if lora else 0, "seed": 7}
    flags = trainer_runs.flags(world, world / f"{rows}.jsonl", tmp_path / "run", **changes)
    run = dpo.train(parse(DPOConfig, "dpo", flags).config).path
    trainer = by_hand("DPO", world, getattr(trainer_runs, rows)(), tmp_path / "trl", lora)
    assert_same(run, trainer, lora, "loss/dpo")


def test_ipo_is_trls(world: Path, tmp_path: Path) -> None:
    flags = trainer_runs.flags(world, world / "pairs.jsonl", tmp_path / "run", loss="ipo", beta=0.3, seed=7)
    run = dpo.train(parse(DPOConfig, "dpo", flags).config).path
    trainer = by_hand("DPO", world, trainer_runs.pairs(), tmp_path / "trl", True, loss_type="ipo", beta=0.3)
    assert_same(run, trainer, True, "loss/dpo")


@pytest.mark.parametrize(
    "changes", [{}, {"label_smoothing": 0.2, "beta": 0.5}, {"loss": "ipo"}], ids=["sigmoid", "smoothed", "ipo"]
)
def test_the_trainers_loss_is_the_pure_functions(world: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    """The loss that TRL logs at step 3 is `losses.dpo` of the weights after step 2, which the evaluation gives."""
    more = {"batch_size": 30, "micro_batch": 30, "optim.schedule": "constant", "test_data": world / "pairs.jsonl"}
    runs = []
    for steps in (2, 3):
        flags = trainer_runs.flags(world, world / "pairs.jsonl", tmp_path / str(steps), steps=steps, **more, **changes)
        runs.append(dpo.train(parse(DPOConfig, "dpo", flags).config))
    logged = tiny_runs.read_lines(runs[1].path / "metrics.jsonl")[2]["loss/dpo"]
    assert runs[0].read("evaluation.json")["loss"] == pytest.approx(logged, rel=1e-5)


def test_fast_kernels_change_rounding_only(world: Path, tmp_path: Path) -> None:
    losses = []
    for fast in ("true", "false"):
        flags = trainer_runs.flags(world, world / "pairs.jsonl", tmp_path / fast, fast_kernels=fast)
        run = dpo.train(parse(DPOConfig, "dpo", flags).config).path
        losses.append([row["loss/dpo"] for row in tiny_runs.read_lines(run / "metrics.jsonl")])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_adapters_need_no_second_model(world: Path, tmp_path: Path) -> None:
    """The reference is the model with its adapter disabled: the trainer holds no other weights."""
    flags = trainer_runs.flags(world, world / "pairs.jsonl", tmp_path / "run")
    config = parse(DPOConfig, "dpo", flags).config
    start = dpo.open_start(config)
    rows = preference_pairs(config, start, None)
    with quiet_trl():
        trainer = dpo.make_trainer(config, dpo.RunFolder(tmp_path / "run", "dpo"), start, rows.training)
    assert trainer.ref_model is None and list(trainer.model.peft_config) == ["default"]
