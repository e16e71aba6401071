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

import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from apportion import disk, parallel
from apportion.errors import Interrupted
from apportion.models.load import pick_device
from apportion.runs import Run
from apportion.stages.checkpoint import load_latest, save_checkpoint, set_aside
from apportion.stages.held import Held
from apportion.stages.sharing import check_start
from apportion.stages.signals import Signals
from apportion.stages.surroundings import repeatable, use_threads


class Keeper:
    """Keeps one run; every method is called by all processes alike, and the main one writes."""

    def __init__(self, run: Run, every: int, keep: int, signals: Signals) -> None:
        self.run, self.every, self.keep, self.signals = run, every, keep, signals
        self.held: Held | None = None

    def resume(self, held: Held) -> int:
        """Put the newest good checkpoint into `held` and return the step that it was made after, 0 for none.

        Raises:
            DiskError: there are checkpoints and none is good. ConfigError: another process found another one.
        """
        self.held = held
        with parallel.together():
            start = load_latest(self.run, held)
        check_start(start)
        with parallel.together():
            if parallel.is_main():
                set_aside(self.run, start)
            if fired := self.run.facts.pop("guards", {}):
                self.run.facts["guards"] = {name: said for name, said in fired.items() if said["step"] <= start}
            if start:
                self.run.know(resumed_from=start)
        self.signals.batches = True
        return start

    def log(self, step: int, metrics: Mapping[str, float], records: Iterable[Mapping[str, Any]] = ()) -> None:
        """Write down a batch."""
        with parallel.together():
            self.run.log(step, metrics, records)

    def kept(self, step: int, steps: int) -> None:
        """Write a checkpoint where one is due after `step` of `steps`, or where a signal came.

        Raises:
            Interrupted: a signal came; what was learned so far is in a checkpoint.
        """
        caught = int(parallel.largest({"signal": self.signals.caught})["signal"])
        due = bool(self.every) and step % self.every == 0 and step < steps
        if due or caught:
            with parallel.together():
                if parallel.is_main():
                    assert self.held is not None
                    save_checkpoint(self.run, self.held, step, keep=self.keep)
        if caught:
            raise Interrupted(f"interrupted after step {step} of {steps}, with a checkpoint.", 128 + caught)

    def final(
        self, save: Callable[[Path], None], judge: Callable[[Path], None] = lambda folder: None, wanted: int = 1 << 20
    ) -> None:
        """Have the main process write final/: it has that name when all of it is there.

        Args:
            save: writes the model to a folder. judge: reads it there, and may add to it.
            wanted: bytes that it takes, about.
        """
        part = self.run.path / "final.tmp"
        self.signals.batches = False

        def work() -> None:
            shutil.rmtree(part, ignore_errors=True)
            try:
                save(part)
            except BaseException:
                shutil.rmtree(part, ignore_errors=True)
                raise

        with parallel.together():
            if parallel.is_main():
                self.run.patiently(work, wanted)
                judge(part)
                self.run.patiently(lambda: disk.place(part, self.run.path / "final"), 1 << 12)


@contextmanager
def keeping(run: Run, config: Any) -> Iterator[Keeper]:
    """Give the keeper of a run with these settings: threads as it began with, deterministic kernels, signals noted,
    a full disk waited for; how the run ends is in status.json."""
    with run.failing(), Signals(run.say) as signals, repeatable(pick_device(config.device)):
        run.disk_wait, run.hurried = config.disk_wait, lambda: bool(signals)
        run.know(threads=use_threads(run, config.threads))
        yield Keeper(run, config.checkpoint_every, config.keep_checkpoints, signals)
