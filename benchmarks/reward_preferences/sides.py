"""A model of either side, trained on some pairs and judged on others."""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from apportion.config import RewardConfig
from apportion.data.answers.rankings import read_rankings
from apportion.models.loading import locate, pick_device, pick_dtype
from apportion.models.reward import load_reward
from apportion.models.tokenizers import load_tokenizer
from apportion.stages.reward.evaluation import scored
from apportion.stages.reward.excerpts import RankedExcerpts, right_pad
from apportion.stages.reward.ranked_evaluation import pairs_of
from apportion.stages.reward.ranked_inputs import Encoder
from benchmarks.reward_preferences.pairs import TEXTS, Row, at_whole_length

SIDES = ("ours", "trl")


def judged(
    side: str, lr: float, training: Sequence[Row], test: Sequence[Row], options: argparse.Namespace
) -> dict[str, Any]:
    """Train on `training`; return seconds and the pairs of `test`: prompt, score and length differences, length."""
    with tempfile.TemporaryDirectory(prefix="apportion-preferences-") as name:
        folder = Path(name)
        for part, rows in (("train", training), ("test", test)):
            lines = "".join(json.dumps({key: row[key] for key in TEXTS}) + "\n" for row in rows)
            (folder / f"{part}.jsonl").write_text(lines, encoding="utf-8")
        config = reward_config(folder, lr, options)
        tokenizer = load_tokenizer("model", locate("model", options.model))
        units = read_rankings(str(folder / "test.jsonl"), make=Encoder(config, lambda: tokenizer, "test_data"))
        began = perf_counter()
        scores = (ours if side == "ours" else trl)(config, units, folder, tokenizer)
        seconds = perf_counter() - began
    found = at_whole_length(pairs_of(units, scores.split([len(unit.completions) for unit in units])), test)
    return {"seconds": round(seconds, 1), "training": len(training), "pairs": [list(pair) for pair in found]}


def reward_config(folder: Path, lr: float, options: argparse.Namespace) -> RewardConfig:
    """Return the settings of our side, from which TRL's are made."""
    config = RewardConfig(
        model=options.model,
        data=str(folder / "train.jsonl"),
        test_data=str(folder / "test.jsonl"),
        output=str(folder / "run"),
        batch_size=options.batch,
        micro_batch=options.batch,
        checkpoint_every=0,
        seed=options.seed,
        threads=options.threads,
    )
    config.preferences.whole, config.preferences.epochs = True, options.epochs
    config.preferences.max_tokens = options.answer_tokens + 8  # decoding and encoding may add some
    config.optim.lr, config.lora.targets = lr, "all"
    return config


def ours(config: RewardConfig, units: Sequence[RankedExcerpts], folder: Path, tokenizer: Any) -> Tensor:
    """Return the scores (N,) of all answers by a model of `apportion reward`."""
    from apportion.stages.reward.train import train

    train(config)
    reward = load_reward(str(folder / "run" / "final"), dtype=config.dtype, device=config.device, field="model")
    return scored(reward, [one for unit in units for one in unit.completions])


def trl(config: RewardConfig, units: Sequence[RankedExcerpts], folder: Path, tokenizer: Any) -> Tensor:
    """Return the scores (N,) of all answers by a model of TRL's RewardTrainer."""
    import datasets
    from peft import LoraConfig
    from transformers import AutoModelForSequenceClassification
    from trl import RewardConfig as TRLConfig
    from trl import RewardTrainer

    torch.manual_seed(config.seed)
    half = pick_dtype(config.dtype, pick_device(config.device)) == torch.bfloat16
    model = AutoModelForSequenceClassification.from_pretrained(
        locate("model", config.model),
        num_labels=1,
        dtype=torch.float32,  # in bfloat16 the head, which PEFT leaves in it, would lose small steps
    )
    rows = [json.loads(line) for line in Path(config.data).read_text(encoding="utf-8").splitlines()]
    settings = TRLConfig(
        output_dir=str(folder / "trl"),
        per_device_train_batch_size=config.batch_size,
        num_train_epochs=config.preferences.epochs,
        learning_rate=config.optim.lr,
        lr_scheduler_type="linear",
        warmup_steps=config.optim.warmup,
        adam_epsilon=config.optim.eps,
        max_grad_norm=config.optim.max_grad_norm,
        max_length=None,
        gradient_checkpointing=False,
        bf16=half,
        use_cpu=True,
        save_strategy="no",
        report_to=[],
        seed=config.seed,
        disable_tqdm=True,
    )
    adapters = LoraConfig(
        r=config.lora.rank,
        lora_alpha=int(config.lora.alpha),
        target_modules="all-linear",
        modules_to_save=["score"],
        task_type="SEQ_CLS",
    )
    data = datasets.Dataset.from_list(rows)
    trainer = RewardTrainer(
        model=model, args=settings, processing_class=tokenizer, train_dataset=data, peft_config=adapters
    )
    trainer.train()
    return trl_scores(trainer.model, units, tokenizer)


@torch.no_grad()
def trl_scores(model: Any, units: Sequence[RankedExcerpts], tokenizer: Any) -> Tensor:
    """Return the scores (N,) of all answers, each behind its prompt and with an end token, as TRL trains them."""
    model.eval()
    rows = [one for unit in units for one in unit.completions]
    ended = [row._replace(ids=[*row.ids, tokenizer.eos_token_id]) for row in rows]
    out, order = torch.zeros(len(rows)), sorted(range(len(rows)), key=lambda i: len(rows[i].ids))
    for first in range(0, len(order), 32):
        chosen = order[first : first + 32]
        ids, mask, _ = right_pad([ended[i] for i in chosen], model.config.get_text_config().pad_token_id)
        out[chosen] = model(input_ids=ids, attention_mask=mask).logits[:, 0].float()
    return out
