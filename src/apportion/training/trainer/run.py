"""Training with a Trainer inside a run folder: resumed, logged, checkpointed, stopped by signals."""

from __future__ import annotations

import io
import logging as stdlib_logging
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from apportion.config.trainer import TrainerConfig
from apportion.errors import ApportionError, ConfigError
from apportion.models.pretrained import quiet
from apportion.system.progress import activity
from apportion.training.checkpoint import use_latest
from apportion.training.run_folder import RunFolder
from apportion.training.session import TrainingSession
from apportion.training.trainer.callback import NothingLeft, clear_partial, disk_error, make_callback

SCHEDULES = {"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup"}


def arguments_of(config: TrainerConfig, run: RunFolder, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Return the TrainingArguments that `config` stands for, as keywords of TRL's SFTConfig and DPOConfig alike.

    Products of float32 weights in bfloat16 (autocast) are for models all of whose weights are trained: adapters learn
    in float32 over a base that is in bfloat16 itself.

    Raises:
        ConfigError: several GPUs in one process, which TRL's trainers refuse.
    """
    if device.type == "cuda" and torch.cuda.device_count() > 1:
        fix = "Set CUDA_VISIBLE_DEVICES to one of them."
        raise ConfigError("device", f"{torch.cuda.device_count()} GPUs", "one", fix)
    micro = max(n for n in range(1, min(config.micro_batch, config.batch_size) + 1) if config.batch_size % n == 0)
    optim = config.optim
    return {
        "output_dir": str(run.path / "checkpoints"),
        "use_cpu": device.type == "cpu",
        "bf16": dtype == torch.bfloat16 and config.lora.rank == 0,
        "seed": config.seed,
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": config.batch_size // micro,
        "num_train_epochs": config.epochs,
        "max_steps": -1 if config.steps is None else config.steps,
        "learning_rate": optim.lr,
        "lr_scheduler_type": SCHEDULES[optim.schedule],
        "warmup_steps": optim.warmup if optim.warmup < 1 else 0.999999,  # from 1 on it would be a number of steps
        "adam_epsilon": optim.eps,
        "weight_decay": optim.weight_decay,
        "max_grad_norm": optim.max_grad_norm,
        "gradient_checkpointing": config.gradient_checkpointing,
        "dataloader_pin_memory": device.type != "cpu",
        "logging_steps": 1,
        "logging_nan_inf_filter": False,  # it would replace a loss that is not finite in the logs
        "save_strategy": "no",  # the callback says when
        "report_to": [],
        "disable_tqdm": True,
        "push_to_hub": False,
    }


@contextmanager
def quiet_trl() -> Iterator[None]:
    """Import and run TRL without its telemetry, advice and progress bars."""
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    from huggingface_hub import constants

    constants.HF_HUB_DISABLE_TELEMETRY = True  # read from the environment only when the library is imported
    import datasets
    from transformers.utils import logging

    with redirect_stdout(io.StringIO()):  # it prints there where WANDB_MODE is offline, tracked or not
        import transformers.integrations.integration_utils  # noqa: F401
    level = stdlib_logging.getLogger("trl").level
    stdlib_logging.getLogger("trl").setLevel(stdlib_logging.ERROR)
    bars = datasets.utils.are_progress_bars_disabled(), logging.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    logging.disable_progress_bar()
    try:
        with quiet(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning)
            warnings.filterwarnings("ignore", message=".*lr_scheduler.step.*")
            yield
    finally:
        stdlib_logging.getLogger("trl").setLevel(level)
        if not bars[0]:
            datasets.enable_progress_bars()
        if bars[1]:
            logging.enable_progress_bar()


def run_trainer(session: TrainingSession, trainer: Any, config: TrainerConfig, names: Mapping[str, str]) -> None:
    """Train with `trainer` to the end, from the newest good checkpoint in the run folder.

    Args:
        names: as `make_callback` takes them.

    Raises:
        Interrupted: a signal came; the state after its step is in a checkpoint.
        DiskError: no checkpoint is good, or one cannot be written. ScoreError: a metric that is not finite.
    """
    from transformers import PrinterCallback

    assert session.run is not None
    run, found = session.run, list[Path]()
    clear_partial(run)
    start = session.resume(
        lambda run: use_latest(run, lambda: {"model": trainer.model}, lambda folder, files: found.append(folder))
    )
    trainer.remove_callback(PrinterCallback)
    with activity("training", session.total, unit="step", start=start) as entry:
        callback = make_callback(session, trainer.model, entry, names, config.checkpoint_every, config.keep_checkpoints)
        trainer.add_callback(callback)
        try:
            trainer.train(resume_from_checkpoint=str(found[0]) if found else None)
        except NothingLeft:
            pass
        except (OSError, SafetensorError, RuntimeError) as error:  # the last is that of torch's writer
            if not callback.saving or isinstance(error, ApportionError):
                raise
            clear_partial(run)  # on a full disk its room is needed
            raise disk_error(run, error) from error
    session.end_steps()
    if signal := session.signal:
        raise session.interrupted(signal)
