"""One kill: a run starts, is killed at a chosen moment, resumes to its end, and is compared with the reference."""

from __future__ import annotations

import json
import os
import random
import shutil
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from apportion.errors import ApportionError
from benchmarks.faults.compare import Traces, difference, traces
from benchmarks.faults.process import Process
from benchmarks.faults.world import KINDS, arguments_of

POLL = 0.0003  # seconds between looks for a checkpoint that is being written
LONGER = 1.25  # moments are sampled over more than the measured length: a run may be slower than the reference
SOONER = 0.8  # factor of the delay within a checkpoint after each attempt that came too late
ATTEMPTS = 20  # a run may end before its moment, a checkpoint before it is seen


class UnexpectedEnd(ApportionError):
    """A run that did not end as planned; the message holds its output."""


@dataclass(frozen=True)
class Reference:
    """An undisturbed run: its traces, its seconds, and the median seconds of writing a checkpoint."""

    traces: Traces
    seconds: float
    checkpoint: float


@dataclass(frozen=True)
class Plan:
    """One kill: its number, the kind of run, whether it aims at the writing of a checkpoint, and its own seed."""

    number: int
    kind: str
    aimed: bool
    seed: int
    root: Path
    shared: dict[str, Any]  # settings of every run

    @property
    def last(self) -> int:
        """The step of the last checkpoint of such a run, at least 1."""
        own = {**self.shared, **KINDS[self.kind]}
        return int((own["steps"] - 1) // own["checkpoint_every"] * own["checkpoint_every"])

    def start(self, name: str) -> tuple[Path, Process]:
        """Start a run in the folder `name`, or resume it."""
        run = self.root / name
        words = arguments_of(self.root / "world", run, self.kind, **self.shared)
        # runs of the whole model are new interpreters, as a user's are
        return run, Process(words, run.with_name(f"{name}.txt"), fork=self.kind != "smollm2")


def reference(plan: Plan) -> Reference:
    """Run to the end, undisturbed."""
    run, process = plan.start(f"whole-{plan.kind.replace(' ', '-')}")
    durations = _checkpoint_durations(run, process)
    _check_finished(process)
    seconds = time.monotonic() - process.began
    return Reference(traces(run), seconds, statistics.median(durations) if durations else 0.0)


def _checkpoint_durations(run: Path, process: Process) -> list[float]:
    """Return, when the run has ended, the seconds of writing each checkpoint that was seen."""
    durations, began = [], None
    while process.poll() is None:
        now, writing = time.monotonic(), _is_writing(run, 0)
        if writing and began is None:
            began = now
        elif not writing and began is not None:
            durations.append(now - began)
            began = None
        time.sleep(POLL)
    return durations


def _check_finished(process: Process) -> None:
    code = process.wait()
    if code != 0:
        raise UnexpectedEnd(f"a run ended with exit code {code} and printed:\n{process.text()}")


def kill_once(plan: Plan, undisturbed: Reference) -> dict[str, Any]:
    """Kill a run, resume it, and return the outcome."""
    rng, length, delay, attempts = random.Random(plan.seed), LONGER * undisturbed.seconds, undisturbed.checkpoint, 0
    while True:
        attempts += 1
        attempt = _kill(plan, length, delay, rng)
        if attempt.killed and attempt.partial >= plan.aimed:
            break
        if attempts == ATTEMPTS:
            raise UnexpectedEnd(f"no run of kind {plan.kind} could be killed as planned in {ATTEMPTS} attempts")
        if not attempt.killed:  # it ended before its moment: take its length as the current one
            length = attempt.seconds
        delay *= SOONER
        shutil.rmtree(attempt.run, ignore_errors=True)
    run = attempt.run
    logged = _batches_logged(run)
    _, resumed = plan.start(run.name)
    _check_finished(resumed)
    status = json.loads((run / "status.json").read_text(encoding="utf-8"))
    compared = difference(undisturbed.traces, traces(run))
    if compared["weights"] and compared["logs"]:  # a run that differs stays for inspection
        shutil.rmtree(run)
    return {
        "number": plan.number,
        "kind": plan.kind,
        "aimed": plan.aimed,
        "attempts": attempts,
        "seconds": round(attempt.seconds, 3),
        "batches_logged": logged,
        "in_checkpoint": attempt.partial,
        "resumed_from": status.get("resumed_from", 0),
        **compared,
    }


class Attempt(NamedTuple):
    """An attempted kill: run folder, seconds, whether it was killed, and whether a partial checkpoint is left."""

    run: Path
    seconds: float
    killed: bool
    partial: bool


def _kill(plan: Plan, length: float, delay: float, rng: random.Random) -> Attempt:
    """Start a run and kill it: within `delay` seconds of the start of a checkpoint's writing, or within `length`
    seconds of its own start."""
    run, process = plan.start(f"kill-{plan.number}")
    if plan.aimed:
        _await_checkpoint(run, process, rng.randint(1, plan.last))
        time.sleep(rng.uniform(0, delay))
    else:
        moment = process.began + rng.uniform(0, length)
        while time.monotonic() < moment and process.poll() is None:
            time.sleep(0.002)
    killed, seconds = process.kill() == -9, time.monotonic() - process.began
    return Attempt(run, seconds, killed, any(run.glob("checkpoints/step-*.tmp")))


def _await_checkpoint(run: Path, process: Process, step: int) -> None:
    """Return when a checkpoint of `step` or later is being written, or the run has ended."""
    while process.poll() is None and not _is_writing(run, step):
        time.sleep(POLL)


def _is_writing(run: Path, step: int) -> bool:
    """Whether a checkpoint of `step` or later is being written."""
    try:
        names = os.listdir(run / "checkpoints")
    except FileNotFoundError:
        return False
    return any(name.endswith(".tmp") and int(name[5:-4]) >= step for name in names)


def _batches_logged(run: Path) -> int:
    log = run / "metrics.jsonl"
    return log.read_bytes().count(b"\n") if log.is_file() else 0
