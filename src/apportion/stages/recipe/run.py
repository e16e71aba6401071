"""The stages of a recipe one after another, each in a process of its own: its memory is free before the next begins."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

from apportion.config.chain.resolve import Stage
from apportion.errors import ConfigError
from apportion.stages.recipe.inputs import Input, check_made, inputs_of
from apportion.stages.recipe.state import ChainState, settings_of
from apportion.system import heartbeat, safe_yaml
from apportion.system.progress import Activity, activity, duration, running
from apportion.system.schedule import Part, Schedule
from apportion.training.run_folder import RunFolder

POLL = 1.0  # seconds between looks at a stage's progress
FRESH = ("split", "sft", "sample", "reward", "rl", "dpo", "evaluate")  # commands that have --fresh
STEPS = "steps"
Note = Callable[[str], None]


class Todo(NamedTuple):
    """A stage, what it reads, and what is to be done with it: "run", "resume", "repeat", "skip" or "leave"."""

    stage: Stage
    inputs: Sequence[Input]
    action: str


def todo(
    stages: Sequence[Stage], state: ChainState, *, only: Sequence[str] = (), first: str | None = None
) -> list[Todo]:
    """Return what is to be done with each stage. Nothing is loaded, and no stage is started.

    Args:
        only: names of the stages to run; empty for all. first: the stage to start from, None for the first.

    Raises:
        ConfigError: a stage without its input, or one whose settings or inputs have changed since it was run.
    """
    found = []
    reached = first is None
    for number, stage in enumerate(stages):
        reached = reached or stage.name == first
        inputs = inputs_of(stage, stages[:number])
        wanted = reached and (not only or stage.name in only)
        if wanted and state.is_foreign(stage):
            fix = "Choose another --output, or move that folder away."
            raise ConfigError(f"stage {stage.name}", f"{stage.folder} of another run", "a new folder", fix)
        changed = state.difference(stage, inputs)
        if changed is not None and wanted:
            fix = f"Repeat it, and the stages that use it, with --redo {stage.name}; or choose another --output."
            raise ConfigError(f"stage {stage.name}", changed, "what it was run with", fix)
        if not wanted:
            action = "leave"
        elif state.finished(stage):
            action = "skip"
        elif state.is_stale(stage):
            action = "repeat"
        else:
            action = "resume" if stage.name in state.stages and state.is_begun(stage) else "run"
        found.append(Todo(stage, inputs, action))
    will = {one.stage.name for one in found if one.action in ("run", "resume", "repeat")}
    for one in found:
        if one.stage.name in will:
            check_made(one.stage, [i for i in one.inputs if i.stage not in will])
    return found


def dependents(stages: Sequence[Stage], names: Sequence[str]) -> list[str]:
    """Return `names` and every stage that uses one of them, directly or through another, in their order."""
    found = set(names)
    for stage in stages:
        if found & set(stage.uses):
            found.add(stage.name)
    return [stage.name for stage in stages if stage.name in found]


def run_stages(work: Sequence[Todo], state: ChainState, planned: Mapping[str, float], note: Note) -> int:
    """Run what is to be done, in order; return 0, or the exit code of the first stage that did not finish.

    Args:
        planned: seconds that each stage should take, by name; 0 or absent where nothing tells.
        note: prints a line.
    """
    left = [one for one in work if one.action in ("run", "resume", "repeat")]
    for one in work:
        if one.action == "skip":
            note(f"{one.stage.name}: finished before, in {one.stage.folder}")
    parts = [Part(one.stage.name, STEPS, planned.get(one.stage.name, 0.0)) for one in left]
    with running(Schedule("recipe", parts)) as schedule:
        for number, one in enumerate(left, 1):
            remaining = schedule.seconds_left if all(part.seconds for part in parts) else None
            ahead = "" if remaining is None else f"; about {duration(remaining)} left of all"
            note(f"{number}/{len(left)} {one.stage.name}: apportion {one.stage.kind}, in {one.stage.folder}{ahead}")
            code = run_stage(one, state, schedule if remaining is not None else None, number, len(left))
            if code:
                state.write("interrupted" if code in (130, 143) else "failed")
                return code
            note(f"{one.stage.name}: finished in {duration(state.stages[one.stage.name]['seconds'])}")
    if all(state.finished(one.stage) for one in work):
        state.write("finished")
    return 0


def run_stage(one: Todo, state: ChainState, schedule: Schedule | None, number: int, count: int) -> int:
    """Run one stage to its end and return its exit code: 128 and the signal's number where a signal killed it."""
    stage = one.stage
    fresh = one.action == "repeat"
    if fresh and stage.kind == "label":
        set_aside(stage)
    began = time.monotonic()
    state.begin(stage, one.inputs)
    code = 1
    try:
        for command in commands(stage, fresh):
            code = watched(command, stage, state, schedule, number, count)
            if code:
                break
    finally:
        ended = {0: "finished", 130: "interrupted", 143: "interrupted"}.get(code, "failed")
        state.end(stage, ended, time.monotonic() - began)
    return code


def commands(stage: Stage, fresh: bool) -> list[list[str]]:
    """Return the commands of a stage: the one of its name, with a file of its settings; of label the export too."""
    file = stage.folder.parent / f"{stage.name}.yaml"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(safe_yaml.dump(settings_of(stage)), encoding="utf-8")
    start = [sys.executable, "-P", "-m", "apportion"]
    command = [*start, stage.kind, "--config", str(file), *(["--fresh"] if fresh and stage.kind in FRESH else [])]
    if stage.kind != "label":
        return [command]
    rankings = ["--database", stage.config.database, "--output", str(stage.output("rankings"))]
    stage.folder.mkdir(parents=True, exist_ok=True)
    return [command, [*start, "label", "export", *rankings]]


def set_aside(stage: Stage) -> None:
    """Rename the database of a label stage that starts over: people's rankings are never removed."""
    database = Path(stage.config.database)
    number = 1
    while database.with_name(f"{database.name}.{number}").exists():
        number += 1
    for suffix in ("", "-wal", "-shm"):
        path = database.with_name(database.name + suffix)
        if path.is_file():
            path.rename(database.with_name(f"{database.name}.{number}{suffix}"))


def watched(
    command: Sequence[str], stage: Stage, state: ChainState, schedule: Schedule | None, number: int, count: int
) -> int:
    """Run `command` with this process's output, write progress.json meanwhile, and return its exit code."""
    with activity(stage.name), activity(STEPS) as entry:
        process = subprocess.Popen(command, process_group=0)
        with forwarding(process):
            while True:
                try:
                    code = process.wait(POLL)
                    break
                except subprocess.TimeoutExpired:
                    heartbeat.touch()  # the stage speaks for itself
                    follow(entry, stage)
                    left = None if schedule is None else round(schedule.seconds_left)
                    done: dict[str, Any] = {"stage": stage.name, "number": number, "stages": count}
                    done |= {"step": entry.done, "steps": entry.total, "seconds_left": left}
                    state.write_progress(**done)
    return code if code >= 0 else 128 - code


def follow(entry: Activity, stage: Stage) -> None:
    """Take over how far a stage says that it is."""
    try:
        known = RunFolder(stage.folder, stage.kind).read("progress.json")
    except (ConfigError, OSError):
        return
    step, steps = known.get("step"), known.get("steps")
    if isinstance(step, int) and isinstance(steps, int):
        if entry.total is None:
            entry.start = step
        entry.done, entry.total = step, steps


@contextmanager
def forwarding(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """Pass SIGINT and SIGTERM on to `process`, which ends after its step; a second one ends it at once, as ever."""

    def forward(number: int, frame: FrameType | None) -> None:
        if process.poll() is None:
            process.send_signal(number)

    before = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
