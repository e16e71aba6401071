"""One kill: a run begins, is killed at a moment, goes on to its end, and is compared with the reference."""

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
from benchmarks.faults.world import KINDS, arguments

LOOK = 0.0003  # seconds between looks for a checkpoint that is being written
LONGER = 1.25  # moments are drawn over more than the measured length: a run may be slower than the reference
SOONER = 0.8  # of the wait within a checkpoint, after each attempt that came too late
MOST = 20  # attempts: a run may be over before the moment drawn, a checkpoint written before it is seen


class Broken(ApportionError):
    """A run that ended otherwise than it should: what it printed."""


@dataclass(frozen=True)
class Reference:
    """A run that was left alone: what it made, and how many seconds it took, and each of its checkpoints (median)."""

    traces: Traces
    seconds: float
    checkpoint: float


@dataclass(frozen=True)
class Plan:
    """One kill: its number, the kind of run, whether a checkpoint's writing is aimed at, and its own seed."""

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

    def begin(self, name: str) -> tuple[Path, Process]:
        """Begin a run into the folder `name`, or go on with it."""
        run = self.root / name
        words = arguments(self.root / "world", run, self.kind, **self.shared)
        # the whole model's runs are begun anew, as a user's are
        return run, Process(words, run.with_name(f"{name}.txt"), anew=self.kind == "smollm2")


def reference(plan: Plan) -> Reference:
    """Run to the end, undisturbed."""
    run, process = plan.begin(f"whole-{plan.kind.replace(' ', '-')}")
    written = _durations(run, process)
    _done(process)
    seconds = time.monotonic() - process.began
    return Reference(traces(run), seconds, statistics.median(written) if written else 0.0)


def _durations(run: Path, process: Process) -> list[float]:
    """Return the seconds that each checkpoint's writing took, of those that were seen, when the run ends."""
    found, began = [], None
    while process.poll() is None:
        now, there = time.monotonic(), _writing(run, 0)
        if there and began is None:
            began = now
        elif not there and began is not None:
            found.append(now - began)
            began = None
        time.sleep(LOOK)
    return found


def _done(process: Process) -> None:
    code = process.wait()
    if code != 0:
        raise Broken(f"a run ended with exit code {code} and said:\n{process.text()}")


def kill_once(plan: Plan, whole: Reference) -> dict[str, Any]:
    """Kill a run, let it go on, and return what came of it."""
    chance, length, within, attempts = random.Random(plan.seed), LONGER * whole.seconds, whole.checkpoint, 0
    while True:
        attempts += 1
        death = _killed(plan, length, within, chance)
        if death.killed and death.half >= plan.aimed:
            break
        if attempts == MOST:
            raise Broken(f"no run of kind {plan.kind} could be killed as planned in {MOST} attempts")
        if not death.killed:  # it was over before its moment: runs are this quick, or slow, now
            length = death.seconds
        within *= SOONER
        shutil.rmtree(death.run, ignore_errors=True)
    run = death.run
    at = _logged(run)
    _, again = plan.begin(run.name)
    _done(again)
    status = json.loads((run / "status.json").read_text(encoding="utf-8"))
    found = difference(whole.traces, traces(run))
    if found["weights"] and found["logs"]:  # what differs is kept, to be looked at
        shutil.rmtree(run)
    return {
        "number": plan.number,
        "kind": plan.kind,
        "aimed": plan.aimed,
        "attempts": attempts,
        "seconds": round(death.seconds, 3),
        "batches_logged": at,
        "in_checkpoint": death.half,
        "resumed_from": status.get("resumed_from", 0),
        **found,
    }


class Death(NamedTuple):
    """How a run ended: its folder, the seconds it had, whether the kill came first, and left half a checkpoint."""

    run: Path
    seconds: float
    killed: bool
    half: bool


def _killed(plan: Plan, length: float, within: float, chance: random.Random) -> Death:
    """Begin a run and kill it: at a moment of the `within` seconds in which a checkpoint is written, or of its `length`
    seconds."""
    run, process = plan.begin(f"kill-{plan.number}")
    if plan.aimed:
        _await_checkpoint(run, process, chance.randint(1, plan.last))
        time.sleep(chance.uniform(0, within))
    else:
        moment = process.began + chance.uniform(0, length)
        while time.monotonic() < moment and process.poll() is None:
            time.sleep(0.002)
    killed, seconds = process.kill() == -9, time.monotonic() - process.began
    return Death(run, seconds, killed, any(run.glob("checkpoints/step-*.tmp")))


def _await_checkpoint(run: Path, process: Process, after: int) -> None:
    """Return when a checkpoint later than step `after` (or the first one there is time for) is being written."""
    while process.poll() is None and not _writing(run, after):
        time.sleep(LOOK)


def _writing(run: Path, after: int) -> bool:
    """Whether a checkpoint of step `after` or later is being written."""
    try:
        names = os.listdir(run / "checkpoints")
    except FileNotFoundError:
        return False
    return any(name.endswith(".tmp") and int(name[5:-4]) >= after for name in names)


def _logged(run: Path) -> int:
    log = run / "metrics.jsonl"
    return log.read_bytes().count(b"\n") if log.is_file() else 0
