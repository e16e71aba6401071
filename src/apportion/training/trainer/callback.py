"""The callback that makes a Trainer's loop one of a run folder: logs, progress, checkpoints, signals."""

from __future__ import annotations

import errno
import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from apportion.errors import DiskError
from apportion.system.progress import Activity
from apportion.training.checkpoint import progress_of, prune, seal
from apportion.training.run_folder import RunFolder
from apportion.training.session import TrainingSession

PARTIAL = "checkpoint-"  # the Trainer's name for a checkpoint; a whole one gets the name of every stage's, step-N
DRAFT = "README.md"  # TRL's draft of a model card, beside the checkpoints
LEFT_OUT = ("training_args.bin",)  # a pickle, which nothing reads


class NothingLeft(Exception):
    """A run resumes from a checkpoint of its last step."""


def make_callback(
    session: TrainingSession, model: Any, entry: Activity, names: Mapping[str, str], every: int, keep: int
) -> Any:
    """Return a TrainerCallback that runs a Trainer's loop in `session`.

    Args:
        model: what is trained, for what a checkpoint says of its surroundings.
        entry: the activity that counts the steps.
        names: {name in the Trainer's logs: our metric}; other numbers are not logged.
        every, keep: steps between checkpoints, 0 for none, and how many to keep.
    """
    from transformers import TrainerCallback

    assert session.run is not None
    run = session.run

    class SessionCallback(TrainerCallback):
        """Logs each step, seals checkpoints, and ends the loop after the step in which a signal came.

        Attributes:
            saving: whether a checkpoint is being written.
        """

        def __init__(self) -> None:
            self.saving = False
            self._began = 0.0
            self._tokens = 0.0

        def on_train_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            session.total = entry.total = state.max_steps
            if state.global_step >= state.max_steps:
                raise NothingLeft  # the checkpoint's weights are in place; the loop would take a step all the same

        def on_step_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            self._began = time.perf_counter()

        def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            step = session.step = state.global_step
            session.clock = {"update": time.perf_counter() - self._began}
            if step >= state.max_steps:
                session.end_steps()  # before the signal is read: a later one has its usual effect
            signal = session.signal
            if signal or (every and step % every == 0 and step < state.max_steps):
                wanted = checkpoint_bytes(model)
                run.retry_when_full(lambda: require_room(run.path, wanted), wanted)
                control.should_save = True
            if signal:
                control.should_training_stop = True

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **more: Any) -> None:
            if "loss" not in (logs or {}):  # the summary at the end
                return
            metrics = {ours: float(logs[name]) for name, ours in names.items() if name in logs}
            if "tokens" in metrics:  # a running sum of this process
                metrics["tokens"], self._tokens = metrics["tokens"] - self._tokens, metrics["tokens"]
            session.record(state.global_step, metrics)
            entry.done = state.global_step
            session.write_progress(entry)
            session.report(state.global_step, metrics)
            self.saving = bool(control.should_save)  # that is what the Trainer does next

        def on_save(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            finish(run, state.global_step, model, keep)
            self.saving = False

    return SessionCallback()


def checkpoint_bytes(model: Any) -> int:
    """Return about how many bytes a checkpoint takes: what is trained, its two moments, and the tokenizer."""
    trained: int = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    return 3 * trained + (1 << 24)


def require_room(folder: Path, wanted: int) -> None:
    """Raise OSError, as a full disk does, unless `wanted` bytes are free: a Trainer does not wait while it saves."""
    if shutil.disk_usage(folder).free < wanted:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def finish(run: RunFolder, step: int, model: Any, keep: int) -> None:
    """Seal the Trainer's checkpoint of `step`: our progress and manifest, our name, older ones removed.

    Raises:
        DiskError: the disk is full, also after waiting for it.
    """
    folder = run.path / "checkpoints"
    part = folder / f"{PARTIAL}{step}"
    for name in LEFT_OUT:
        (part / name).unlink(missing_ok=True)
    (folder / DRAFT).unlink(missing_ok=True)
    run.retry_when_full(lambda: seal(part, folder / f"step-{step}", progress_of(run, step, {"model": model})), 1 << 16)
    prune(run, step, keep)


def clear_partial(run: RunFolder) -> None:
    """Remove the checkpoints that a Trainer began and did not finish."""
    for part in (run.path / "checkpoints").glob(f"{PARTIAL}*"):
        shutil.rmtree(part, ignore_errors=True)
    (run.path / "checkpoints" / DRAFT).unlink(missing_ok=True)


def disk_error(run: RunFolder, error: Exception) -> DiskError:
    """Return the error of a checkpoint that could not be written."""
    fix = "Free some space, then run the same command again: it resumes from the last checkpoint."
    reason = " ".join(str(error).split())[:200]
    return DiskError("output", f"{run.path / 'checkpoints'} ({reason})", "a folder to write to", fix)
