"""Parts that the runs of TRL's trainers share: prompts, tokenizer, settings, and the end of a batch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, TrainerCallback

from benchmarks.harness.recorder import Recorder
from benchmarks.harness.settings import Work


class BatchEnd(TrainerCallback):  # type: ignore[misc]
    """Closes the recorder's batch after every `steps` calls of on_step_end."""

    def __init__(self, recorder: Recorder, steps: int) -> None:
        self.recorder, self.steps, self.seen = recorder, steps, 0

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Begin the first batch."""
        self.recorder.begin()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Count steps, and close the batch after the last one."""
        self.seen += 1
        if self.seen % self.steps == 0:
            self.recorder.batch_done()


def prompts_of(work: Work) -> list[str]:
    """Return the texts of the prompts, enough for every batch of this process."""
    lines = Path(work.prompts).read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["prompt"] for line in lines][: work.total * work.batch // work.samples]


def tokenizer_of(work: Work) -> Any:
    """Return the tokenizer, padded on the left as TRL requires."""
    tokenizer = AutoTokenizer.from_pretrained(work.model, padding_side="left")
    if work.pad_token is not None:
        tokenizer.pad_token = work.pad_token
    return tokenizer


def weights_dtype(work: Work) -> torch.dtype:
    """Return the dtype of every model's weights."""
    return torch.bfloat16 if work.precision == "bfloat16" else torch.float32


def common_settings(work: Work) -> dict[str, Any]:
    """Return the settings of all of TRL's configurations: no logging to services, no files, constant learning rate."""
    return {
        "output_dir": str(Path(work.folder) / "run"),
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "use_cpu": work.device == "cpu" or not torch.cuda.is_available(),
        "bf16": work.precision == "autocast",
        "gradient_checkpointing": work.checkpointing,
        "learning_rate": work.lr,
        "lr_scheduler_type": "constant",
        "temperature": 1.0,
        "seed": work.seed,
    }
