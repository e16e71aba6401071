"""Trackers of a run (tensorboard, wandb, trackio) through accelerate: settings and every metric of metrics.jsonl."""

from __future__ import annotations

import io
import json
import os
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from importlib.util import find_spec
from typing import Any

from apportion.errors import ConfigError, format_problem
from apportion.training.run_folder import RunFolder, flat

STATE = "trackers.json"  # in the run folder: {tracker: {"id": of its run, "step": the last one it got, "failures": n}}
NO_UPLOAD = ("offline", "disabled", "dryrun")  # values of WANDB_MODE
START_SECONDS, END_SECONDS = 30.0, 60.0  # that wandb may wait for its server, when a run starts and when it ends


def check_trackers(names: Sequence[str]) -> None:
    """Check that every tracker can be used, without a network.

    Raises:
        ConfigError: a package that is not installed, or wandb without a key where it is to upload.
    """
    for name in names:
        if find_spec(name) is None:
            fix = f"Run `pip install {name}`, or leave it out."
            raise ConfigError("trackers", name, "an installed package", fix)
    if "wandb" in names and os.environ.get("WANDB_MODE") not in NO_UPLOAD:
        _check_wandb_key()


def _check_wandb_key() -> None:
    """Raise ConfigError unless wandb finds a usable key in its environment or its files; never asks for one."""
    import wandb

    fix = "Run `wandb login`, set WANDB_API_KEY, or set WANDB_MODE=offline to upload later with `wandb sync`."
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            found = wandb.login(prompt=False, verify=False)
    except Exception as error:
        raise ConfigError("trackers", f"wandb: {error}", "the key of an account", fix) from None
    if not found:
        raise ConfigError("trackers", "wandb without a key", "the key of an account", fix)


class Trackers:
    """The trackers of one run, in the process that writes its folder.

    They start with the first step that is logged, and continue the tracker runs whose ids the folder holds. Whatever
    one of them raises is counted in trackers.json and told once; it never ends the run.

    Args:
        names: of the trackers. project: their project. settings: the run's, logged as hyperparameters.
    """

    def __init__(self, names: Sequence[str], project: str, run: RunFolder, settings: Mapping[str, Any]) -> None:
        self._names, self._project, self._run = list(dict.fromkeys(names)), project, run
        self._settings = settings
        self._open: dict[str, Any] | None = None
        self._state: dict[str, dict[str, Any]] = {}

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Give each tracker the metrics of a step; of one that was logged before a resume, tensorboard only."""
        if not self._names:
            return
        if self._open is None:
            self._start(step)
        for name in self._names:
            entry = self._state[name]
            if name != "tensorboard" and step <= entry["step"]:
                continue  # it cannot be taken back there; a resumed run computes the same numbers again
            with self._counted(name):
                self._tracker(name).log(dict(metrics), step=step)
                entry["step"] = step
        self._store()

    def finish(self) -> None:
        """Close the trackers, and say how many calls failed."""
        for name in self._open or {}:
            with self._counted(name):
                END.get(name, self._tracker(name).finish)()
        self._open = None
        for name, entry in self._state.items():
            if count := entry.get("failures"):
                self._run.warn(f"warning: tracker {name}: {count} calls failed; metrics.jsonl has every metric.\n")
        if self._state:
            self._store()

    def _start(self, step: int) -> None:
        from accelerate import PartialState

        PartialState()  # accelerate's trackers write to its logger, which wants one; it exists among several processes
        self._open, before = {}, self._read()
        for name in self._names:
            new = name not in before
            self._state[name] = {"id": uuid.uuid4().hex[:8], "step": 0} if new else before[name]
        self._store()  # before they start: a kill meanwhile leaves the id that they use
        for name in self._names:
            with self._counted(name):
                tracker = START[name](self._project, self._run, self._state[name]["id"], step)
                tracker.start()
                self._open[name] = tracker
                if name not in before or name != "tensorboard":  # which would add a run of its own each time
                    tracker.store_init_configuration(hyperparameters(self._settings))

    def _tracker(self, name: str) -> Any:
        assert self._open is not None
        if name not in self._open:
            raise RuntimeError("it did not start")
        return self._open[name]

    @contextmanager
    def _counted(self, name: str) -> Iterator[None]:
        """Count what the block raises, and tell the first of it; a tracker's own lines do not reach stdout."""
        try:
            with redirect_stdout(io.StringIO()):
                yield
        except Exception as error:
            entry = self._state[name]
            entry["failures"] = entry.get("failures", 0) + 1
            if entry["failures"] == 1:
                got = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
                fix = f"The run continues; {STATE} counts further ones."
                self._run.warn(f"warning: {format_problem(f'tracker {name}', got, 'a call that succeeds', fix)}\n")

    def _read(self) -> dict[str, dict[str, Any]]:
        stored = self._run.read(STATE)
        usable = {name: one for name, one in stored.items() if isinstance(one, dict) and {"id", "step"} <= one.keys()}
        return {name: {"id": str(one["id"]), "step": int(one["step"])} for name, one in usable.items()}

    def _store(self) -> None:
        """Write the ids and steps; without a disk sync, which a step should not wait for."""
        path = self._run.path / STATE
        part = path.with_name(f".{STATE}.tmp")
        try:
            part.write_text(json.dumps(self._state, indent=2) + "\n", encoding="utf-8")
            os.replace(part, path)
        except OSError:  # a full disk: the logs wait for it and report it
            part.unlink(missing_ok=True)


def hyperparameters(settings: Mapping[str, Any]) -> dict[str, bool | int | float | str]:
    """Return the settings by dotted names, as numbers, truth values and text: all that every tracker takes."""
    return {
        name: value if isinstance(value, bool | int | float | str) else json.dumps(value, default=str)
        for name, value in flat(settings).items()
    }


def _tensorboard(project: str, run: RunFolder, key: str, step: int) -> Any:
    """Return the tracker that writes event files to RUN/tensorboard; those of a later step than this are cut off."""
    from accelerate.tracking import TensorBoardTracker

    return TensorBoardTracker("tensorboard", run.path, purge_step=step)


def _wandb(project: str, run: RunFolder, key: str, step: int) -> Any:
    """Return the tracker whose files are in wandb's own folder: they link to its logs, and a run has no such links."""
    import wandb
    from accelerate.tracking import WandBTracker

    quiet = wandb.Settings(console="off", silent=True, init_timeout=START_SECONDS, finish_timeout=END_SECONDS)
    return WandBTracker(project, id=key, name=run.path.name, resume="allow", settings=quiet)


def _trackio(project: str, run: RunFolder, key: str, step: int) -> Any:
    """Return the tracker that writes to trackio's folder; names are its ids, so that each has the id in it."""
    from accelerate.tracking import TrackioTracker

    quiet = {"embed": False, "auto_log_gpu": False, "auto_log_cpu": False}
    return TrackioTracker(project, name=f"{run.path.name}-{key}", resume="allow", **quiet)


# name -> (project, run folder, id of the tracker's run, first step to log) -> accelerate's tracker
START: Mapping[str, Callable[[str, RunFolder, str, int], Any]] = {
    "tensorboard": _tensorboard,
    "wandb": _wandb,
    "trackio": _trackio,
}


def _end_trackio() -> None:
    """End trackio's run, so that it is not ended a second time when the process ends."""
    import trackio

    trackio.finish()


END: Mapping[str, Callable[[], None]] = {"trackio": _end_trackio}  # in place of the tracker's own `finish`
