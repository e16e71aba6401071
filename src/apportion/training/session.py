"""The housekeeping of a training loop, the same for every stage: going on, logs, checkpoints, signals, the final model.

with keeping(run, config) as keeper:
    start = keeper.resume(held)
    for step in range(start + 1, steps + 1):
        ...
        keeper.log(step, metrics, records)
        keeper.kept(step, steps)
    keeper.final(save)
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn

from apportion.distributed import collectives
from apportion.errors import ApportionError, ConfigError, Interrupted, ModelError
from apportion.models.loading import pick_device
from apportion.models.saving import unfinished
from apportion.system import disk, stderr
from apportion.training.checkpoint import load_latest, save_checkpoint, set_aside
from apportion.training.reproducibility import repeatable, use_threads
from apportion.training.run_folder import Follower, Run
from apportion.training.signals import Signals
from apportion.training.state import Held


class TrainingSession:
    """Keeps one run; every method is called by all processes alike, and the main one writes."""

    def __init__(self, run: Run, every: int, keep: int, signals: Signals) -> None:
        self.run, self.every, self.keep, self.signals = run, every, keep, signals
        self.held: Held | None = None
        self.step = self.steps = 0  # the last one that was kept, and how many there are

    def resume(self, held: Held) -> int:
        """Put the newest good checkpoint into `held` and return the step that it was made after, 0 for none.

        Raises:
            DiskError: there are checkpoints and none is good. ConfigError: another process found another one.
        """
        self.held = held
        with collectives.error_barrier():
            start = load_latest(self.run, held)
        check_start(start)
        with collectives.error_barrier():
            if collectives.is_main():
                set_aside(self.run, start)
            if fired := self.run.facts.pop("monitors", {}):
                self.run.facts["monitors"] = {name: said for name, said in fired.items() if said["step"] <= start}
            if start:
                self.run.know(resumed_from=start)
        self.step = self.steps = start
        self.signals.batches = True
        return start

    def log(self, step: int, metrics: Mapping[str, float], records: Iterable[Mapping[str, Any]] = ()) -> None:
        """Write down a batch."""
        with collectives.error_barrier():
            self.run.log(step, metrics, records)

    def kept(self, step: int, steps: int) -> None:
        """Write a checkpoint where one is due after `step` of `steps`, or where a signal came.

        Raises:
            Interrupted: a signal came; what was learned so far is in a checkpoint.
        """
        self.step, self.steps = step, steps
        caught = self._caught()
        due = bool(self.every) and step % self.every == 0 and step < steps
        if due or caught:
            with collectives.error_barrier():
                assert self.held is not None
                if collectives.is_main():
                    save_checkpoint(self.run, self.held, step, keep=self.keep)
                elif self.held.parted:
                    self.held.tensors()  # the main process waits for this one's part
        if caught:
            raise Interrupted(f"interrupted after step {step} of {steps}, with a checkpoint.", 128 + caught)

    def _caught(self) -> int:
        """Return the number of a signal that any process got, 0 for none."""
        return int(collectives.all_reduce_max({"signal": self.signals.caught})["signal"])

    def end(self, error: str) -> None:
        """End this process at once with an error that the others, blocked in a collective, do not get."""
        run = Run(self.run.path, self.run.stage)  # a follower's own writes nothing
        with suppress(ApportionError):  # the disk may be what failed
            run.facts = run.read("status.json")
            run.status("failed", error=error)
        stderr.write(f"apportion: {error}\n")
        os._exit(2)

    def final(
        self,
        save: Callable[[Path], None],
        judge: Callable[[Path], None] = lambda folder: None,
        wanted: int = 1 << 20,
        ready: Callable[[], None] = lambda: None,
    ) -> None:
        """Have the main process write final/: it has that name when all of it is there.

        Args:
            save: writes the model to a folder. judge: reads it there, and may add to it.
            wanted: bytes that it takes, about. ready: called first, by every process.

        Raises:
            Interrupted: a signal came after the last batch; a checkpoint was promised, and is there.
        """
        part = self.run.path / "final.tmp"
        self.signals.batches = False
        if self._caught():
            self.kept(self.step, self.steps)
        ready()

        def clear() -> None:
            for path in (part, unfinished(part)):
                shutil.rmtree(path, ignore_errors=True)

        def work() -> None:
            clear()
            try:
                save(part)
            except BaseException:
                clear()  # on a full disk its room is wanted
                raise

        with collectives.error_barrier():
            if collectives.is_main():
                self.run.patiently(work, wanted)
                judge(part)
                self.run.patiently(lambda: disk.place(part, self.run.path / "final"), 1 << 12)


def bytes_of(model: nn.Module) -> int:
    """Return what a model takes on a disk, about: it is saved in float32."""
    return 4 * sum(p.numel() for p in model.parameters())


@contextmanager
def enough_memory(ppo: bool) -> Iterator[None]:
    """Say which settings need less memory of a GPU where there was not enough; those of the rl stage where `ppo`."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        fewer = "ppo.micro_batch or ppo.micro_tokens" if ppo else "micro_batch"
        expected = "enough memory for the models and a micro-batch"
        got = str(error).partition(". ")[0]
        fix = f"Lower {fewer}, in another --output or with --fresh."
        raise ModelError("device", got, expected, fix) from error


@contextmanager
def keeping(run: Run, config: Any) -> Iterator[TrainingSession]:
    """Give the keeper of a run with these settings: threads as it began with, deterministic kernels, signals noted,
    a full disk waited for; how the run ends is in status.json."""
    device = pick_device(config.device)
    with run.failing(), Signals(run.say) as signals, repeatable(device), enough_memory(hasattr(config, "ppo")):
        run.disk_wait, run.hurried = config.disk_wait, lambda: bool(signals)
        run.know(threads=use_threads(run, config.threads))
        yield TrainingSession(run, config.checkpoint_every, config.keep_checkpoints, signals)


def open_run(output: str, stage: str, config: dict[str, Any], *, fresh: bool) -> Run:
    """Return the run folder, opened by the main process; the others' writes go nowhere. Raises as `Run.open`."""
    with collectives.error_barrier():
        if collectives.is_main():
            return Run.open(output, stage, config, fresh=fresh)
    return Follower(Path(output).expanduser(), stage)


def check_start(step: int) -> int:
    """Return `step`, from which a run goes on. Raises ConfigError where the main process goes on from another."""
    with collectives.error_barrier():
        main = collectives.broadcast_object(step)
        if main != step:
            expected = f"the checkpoint of the main process, step {main}"
            fix = "Put --output on a disk that every machine sees."
            raise ConfigError("output", f"step {step} in process {collectives.rank()}", expected, fix)
    return step
