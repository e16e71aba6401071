"""Run lifecycle shared by all training stages: resume, phases, logs, checkpoints, signals, the final model.

with training_session("rl", config, settings) as session:
    learner = session.load(lambda: make_learner(config))
    for step in session.steps(config.steps):
        with session.phase("generate"):
            ...
        session.log(step, metrics, records)
    session.save_final(save, learner)
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from apportion.distributed import collectives
from apportion.errors import ApportionError, ConfigError, Interrupted, ModelError
from apportion.models.loading import pick_device
from apportion.models.saving import unfinished
from apportion.system import disk, stderr
from apportion.system.memory import memory_mb
from apportion.system.progress import Activity, activity
from apportion.training.checkpoint import discard_after, load_latest, save_checkpoint
from apportion.training.crash_dump import BatchSnapshot, CrashDump
from apportion.training.publish.services import ServiceSettings, check_services, open_trackers, push_final
from apportion.training.publish.trackers import Trackers
from apportion.training.reproducibility import configure_threads, deterministic_kernels
from apportion.training.run_folder import FollowerFolder, RunFolder
from apportion.training.signals import Signals
from apportion.training.state import TrainableLearner
from apportion.types import Rollouts

L = TypeVar("L", bound=TrainableLearner)
PROGRESS_EVERY = 10.0  # seconds between writes of progress.json
ProgressCallback = Callable[[int, int, dict[str, float]], None]  # (step, steps, metrics)


class SessionSettings(ServiceSettings, Protocol):
    """The settings that every training stage has."""

    threads: int | None
    disk_wait: float
    checkpoint_every: int
    keep_checkpoints: int

    @property
    def device(self) -> str:
        """auto, cpu or cuda."""


class TrainingSession:
    """One run of a training stage. All processes call every method alike; the main one writes.

    Made without arguments it serves a loop of your own: phases and steps work, and nothing is written.

    Attributes:
        run: the run folder. finished: whether the run had finished before. crash_dump: saves a failed step's batch.
        step, total: the current step and the number of steps. clock: seconds of the current step by phase.
    """

    def __init__(
        self,
        run: RunFolder | None = None,
        *,
        finished: bool = False,
        signals: Signals | None = None,
        every: int = 0,
        keep: int = 1,
        on_step: ProgressCallback = lambda step, total, metrics: None,
        trackers: Trackers | None = None,
    ) -> None:
        self.run, self.finished, self._trackers = run, finished, trackers
        self._signals = (
            Signals(lambda line: None) if signals is None else signals
        )  # not `or`: one that caught nothing is falsy
        self._every, self._keep, self._on_step = every, keep, on_step
        self._learner: TrainableLearner | None = None
        self.crash_dump: CrashDump | None = None
        self.start = self.step = self.total = 0
        self.clock: dict[str, float] = {}
        self._progress_due = 0.0

    def load(self, make: Callable[[], L]) -> L:
        """Return the learner that `make` makes, resumed from the newest good checkpoint.

        Raises:
            DiskError: there are checkpoints and none is good. ConfigError: another process found another one.
        """
        with activity("loading"), collectives.error_barrier():
            learner = make()
        self._learner, self.crash_dump = learner, learner.crash_dump
        learner.set_up_sharding(self.abort)
        if self.run is not None:
            self.resume(lambda run: load_latest(run, learner))
        learner.broadcast_weights()
        return learner

    def resume(self, load: Callable[[RunFolder], int]) -> int:
        """Return the step that the run resumes from, 0 for none; from here on a signal lets the step end first.

        Args:
            load: restores the newest good checkpoint and returns its step.

        Raises:
            DiskError: there are checkpoints and none is good. ConfigError: another process found another one.
        """
        assert self.run is not None
        run = self.run
        with collectives.error_barrier():
            self.start = load(run)
        check_start(self.start)
        with collectives.error_barrier():
            if collectives.is_main():
                discard_after(run, self.start)
            if fired := run.status_fields.pop("monitors", {}):
                before = {name: entry for name, entry in fired.items() if entry["step"] <= self.start}
                run.status_fields["monitors"] = before
            if self.start:
                run.update_status(resumed_from=self.start)
        self.step = self.total = self.start
        self._signals.in_training = True
        return self.start

    def steps(self, total: int) -> Iterator[int]:
        """Yield the steps from the one after the checkpoint to `total`."""
        with activity("training", total, unit="step", start=self.start) as entry:
            for step in range(self.start + 1, total + 1):
                self.step, self.total, self.clock = step, total, {}
                yield step
                entry.advance()
                self.write_progress(entry)

    def write_progress(self, entry: Activity) -> None:
        """Write progress.json where the last is older than `PROGRESS_EVERY`, and after the last step."""
        now = time.monotonic()
        if self.run is not None and (entry.done == entry.total or now >= self._progress_due):
            self._progress_due = now + PROGRESS_EVERY
            times = {"seconds": entry.seconds, "seconds_left": entry.seconds_left or 0.0}
            self.run.write_progress(step=entry.done, steps=entry.total, **{k: round(v, 1) for k, v in times.items()})

    @contextmanager
    def phase(
        self,
        name: str,
        *,
        local: Rollouts | None = None,
        batch: Rollouts | None = None,
        has_collectives: bool = False,
        columns: Mapping[str, Tensor] | None = None,
        metrics: Mapping[str, float] | None = None,
    ) -> Iterator[None]:
        """Run one phase of a step: its time is measured, an error in one process ends all, a failed batch is saved.

        Args:
            name: the time is logged as time/NAME; phases of one name add up.
            local: this process's rollouts, which each process saves where the phase fails.
            batch: the whole batch, which the main process saves; with `columns` (B,T) and `metrics`.
            has_collectives: the block runs collectives itself, so no error barrier follows it.
        """
        began = time.perf_counter()
        barrier = nullcontext() if has_collectives else collectives.error_barrier()
        rollouts = batch if local is None else local
        save: Any = nullcontext()
        if self.crash_dump is not None and rollouts is not None:
            # not `metrics or {}`: the block adds to the mapping that it was given
            given = {} if columns is None else columns, {} if metrics is None else metrics
            snapshot = BatchSnapshot(self.step, rollouts, local is not None, *given)
            save = self.crash_dump.on_error(snapshot)
        # each process saves its own part before the others learn of the error; the whole batch is saved after
        outer, inner = (save, barrier) if local is None else (barrier, save)
        with outer, inner:
            if self.crash_dump is not None and local is not None:
                self.crash_dump.prepare(self.step, local)
            yield
        self.clock[name] = self.clock.get(name, 0.0) + time.perf_counter() - began

    def log(self, step: int, metrics: dict[str, float], records: Iterable[Mapping[str, Any]] = ()) -> None:
        """Log a step with its times and memory, write a checkpoint where one is due, and report progress.

        Raises:
            Interrupted: a signal came; the state after this step is in a checkpoint.
        """
        self.record(step, metrics, records)
        if self.run is not None:
            self.maybe_checkpoint()
        self.report(step, metrics)

    def record(self, step: int, metrics: dict[str, float], records: Iterable[Mapping[str, Any]] = ()) -> None:
        """Log a step with its times and memory, which are added to `metrics`."""
        used = {f"time/{name}": seconds for name, seconds in self.clock.items()} | {"memory/rss_mb": memory_mb()}
        metrics |= collectives.all_reduce_max(used)
        metrics["time/total"] = sum(value for name, value in metrics.items() if name.startswith("time/"))
        if self.run is not None:
            with collectives.error_barrier():
                written = self.run.log(step, metrics, records)
            if self._trackers is not None:
                self._trackers.log(step, written)

    def report(self, step: int, metrics: dict[str, float]) -> None:
        """Report progress to the caller of the stage."""
        self._on_step(step, self.total, metrics)

    @property
    def signal(self) -> int:
        """The signal that one of the processes caught, 0 for none."""
        return int(collectives.all_reduce_max({"signal": self._signals.caught})["signal"])

    def end_steps(self) -> None:
        """Let a signal have its usual effect again: there is no step to finish."""
        self._signals.in_training = False

    def interrupted(self, signal: int) -> Interrupted:
        """Return what says that `signal` ended the run after the current step, with a checkpoint."""
        text = f"interrupted after step {self.step} of {self.total}, with a checkpoint."
        return Interrupted(text, 128 + signal)

    def maybe_checkpoint(self) -> None:
        """Write a checkpoint where one is due after the current step, or where a signal came.

        Raises:
            Interrupted: a signal came.
        """
        signal = self.signal
        due = bool(self._every) and self.step % self._every == 0 and self.step < self.total
        if due or signal:
            with collectives.error_barrier():
                assert self.run is not None and self._learner is not None
                if collectives.is_main():
                    save_checkpoint(self.run, self._learner, self.step, keep=self._keep)
                elif self._learner.is_sharded:
                    self._learner.state_dict()  # the main process waits for this one's part
        if signal:
            raise self.interrupted(signal)

    def abort(self, error: str) -> None:
        """End this process at once with an error that the others, blocked in a collective, do not get."""
        if self.run is not None:
            run = RunFolder(self.run.path, self.run.stage)  # a follower's own writes nothing
            with suppress(ApportionError):  # the disk may be what failed
                before = run.read("status.json")
                run.status_fields = {name: value for name, value in before.items() if name != "status"}
                run.write_status("failed", error=error)
        stderr.write(f"apportion: {error}\n")
        os._exit(2)

    def save_final(
        self,
        save: Callable[[Path], None],
        learner: TrainableLearner | None,
        *,
        size: int,
        evaluate: Callable[[Path], None] = lambda folder: None,
    ) -> None:
        """Write final/ atomically (final.tmp, then a rename), in the main process.

        Args:
            save: writes the model to a folder. evaluate: scores the model there, and may add files.
            learner: gathers its weights first; None where another library's loop trained.
            size: bytes that it takes, about.

        Raises:
            Interrupted: a signal came after the last step; the checkpoint that it promised is written.
        """
        assert self.run is not None
        run, part = self.run, self.run.path / "final.tmp"
        self.end_steps()
        if self.signal:
            self.maybe_checkpoint()
        if learner is not None:
            learner.gather_weights()

        def clear() -> None:
            for path in (part, unfinished(part)):
                shutil.rmtree(path, ignore_errors=True)

        def work() -> None:
            clear()
            try:
                save(part)
            except BaseException:
                clear()  # on a full disk its room is needed
                raise

        with collectives.error_barrier():
            if collectives.is_main():
                with activity("saving the model"):
                    run.retry_when_full(work, size)
                evaluate(part)
                run.retry_when_full(lambda: disk.replace_durably(part, run.path / "final"), 1 << 12)


def saved_bytes(model: nn.Module) -> int:
    """Return the approximate size of a saved model: it is saved in float32."""
    return 4 * sum(p.numel() for p in model.parameters())


@contextmanager
def explain_out_of_memory(settings: str) -> Iterator[None]:
    """Turn a GPU's out-of-memory error into one that names the `settings` to lower."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        expected = "enough memory for the models and a micro-batch"
        fix = f"Lower {settings}, in another --output or with --fresh."
        raise ModelError("device", str(error).partition(". ")[0], expected, fix) from error


@contextmanager
def training_session(
    stage: str,
    config: SessionSettings,
    settings: Mapping[str, Any],
    *,
    fresh: bool = False,
    memory_settings: str = "micro_batch",
    on_step: ProgressCallback = lambda step, total, metrics: None,
) -> Iterator[TrainingSession]:
    """Open the run folder of `stage` and the process group, and yield its session.

    Threads are those that the run started with, kernels are deterministic on a CPU, signals are caught, a full disk is
    waited for; how the run ends is written to status.json. A run that had finished before yields a session whose
    `finished` is True.

    Args:
        settings: every setting, for config.yaml. memory_settings: what to lower where a GPU has too little memory.
        on_step: called after each step with (step, steps, metrics).

    Raises:
        ConfigError, DiskError: as `RunFolder.open`. ConfigError: as `check_trackers` and `check_hub`.
        HubError: the finished model could not be uploaded.
    """
    device = pick_device(config.device)
    collectives.start(device)
    check_services(config, stage, fresh=fresh)
    run = open_run(config.output, stage, settings, fresh=fresh)
    if collectives.broadcast_object(run.finished):
        yield TrainingSession(run, finished=True)
        push_final(run, config)
        return
    trackers = open_trackers(config, run, settings)
    with (
        run.record_failure(),
        Signals(run.warn) as signals,
        deterministic_kernels(device),
        explain_out_of_memory(memory_settings),
    ):
        run.disk_wait, run.stop_waiting = config.disk_wait, lambda: bool(signals)
        run.update_status(threads=configure_threads(run, config.threads))
        every, keep = config.checkpoint_every, config.keep_checkpoints
        try:
            yield TrainingSession(run, signals=signals, every=every, keep=keep, on_step=on_step, trackers=trackers)
        finally:
            if trackers is not None:
                trackers.finish()
    push_final(run, config)


def open_run(output: str, stage: str, settings: Mapping[str, Any], *, fresh: bool) -> RunFolder:
    """Return the run folder, opened by the main process; the others' writes do nothing. Raises as `RunFolder.open`."""
    with collectives.error_barrier():
        if collectives.is_main():
            return RunFolder.open(output, stage, settings, fresh=fresh)
    return FollowerFolder(Path(output).expanduser(), stage)


def check_start(step: int) -> int:
    """Return `step`, from which a run resumes. Raises ConfigError where the main process resumes from another."""
    with collectives.error_barrier():
        main = collectives.broadcast_object(step)
        if main != step:
            expected = f"the checkpoint of the main process, step {main}"
            fix = "Put --output on a disk that every machine sees."
            raise ConfigError("output", f"step {step} in process {collectives.rank()}", expected, fix)
    return step
