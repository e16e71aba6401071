"""The monitors of a run: monitors over its metrics, updates that are not finite, functions of the user's that fail; and
what is left behind when one of them stops it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from apportion import monitors, registry
from apportion.config.monitors import MonitorsConfig
from apportion.distributed import collectives
from apportion.errors import ApportionError, DiskError, MonitorError, ScoreError, format_problem
from apportion.monitors import Alert
from apportion.system import stderr
from apportion.training import crash_dump
from apportion.training.nonfinite import SkippedUpdates
from apportion.training.run_folder import Run
from apportion.types import Rollouts, State
from apportion.user_code import Users, raised

STEP, MOST = 1.1, 10.0  # κ grows by this factor a batch while a monitor tightens, up to this many times its start
FAILURE = "A failure never becomes a reward: fix what gave it."


@dataclass
class Scene:
    """What is known of the batch at hand, for the case that the run stops in it.

    Attributes:
        step, rollouts: which batch. columns: tensors (B,T) by the name that rollouts.jsonl has for them.
        later: makes further columns of `rollouts` when they are wanted. metrics: the batch's.
        alone: these are this process's rollouts, not the whole batch.
    """

    step: int
    rollouts: Rollouts
    alone: bool = False
    columns: dict[str, Tensor] = field(default_factory=dict)
    later: dict[str, Callable[[Rollouts], Tensor]] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)


class Monitors:
    """The monitors of one run; `learner.monitors`.

    Attributes:
        config: what each does. skips: counts updates that are not finite. watched: the state of the monitors.
        users: calls functions of the user's. run: where things are left behind; None (a loop of your own): nowhere.
    """

    def __init__(self, config: MonitorsConfig, users: Users, tokenizer: Any, specs: Mapping[str, Any]) -> None:
        self.config, self.users, self.tokenizer, self.specs = config, users, tokenizer, specs
        self.monitors = [make() for name, make in monitors.MONITORS.items() if getattr(config, name) != "off"]
        self.skips, self.watched = SkippedUpdates(config.max_skipped), monitors.init(self.monitors)
        self.modules = {name.split(":")[0]: name for name in registry.user_functions(specs)}
        self.run: Run | None = None

    @property
    def state(self) -> State:
        """Return what a checkpoint holds of the monitors."""
        return self.watched | self.skips.state

    def restore(self, state: State) -> None:
        """Go on from a checkpoint's `state`; a monitor that was off when it was written begins anew."""
        if "skipped_total" in state:  # else it was written before there were monitors
            self.skips.restore(state)
            self.watched |= {name: state[name] for name in self.watched if name in state}

    def look(
        self, step: int, metrics: Mapping[str, float], rows: int, raise_kl_coef: Callable[[float, float], bool]
    ) -> dict[str, float]:
        """Judge batch `step` of `rows` rollouts by its metrics and return metrics of the monitors.

        A monitor that begins to fire is named on stderr and in status.json. One that raises κ calls
        `raise_kl_coef(factor, most)`, which returns whether κ rose.

        Raises:
            MonitorError: a monitor that was told to stop fires.
        """
        seen = {k: v for k, v in metrics.items() if rows > 1 or k != "objective/scores_std"}  # one rollout has none
        found, self.watched = monitors.observe(self.monitors, seen, self.watched)
        fires = [finding for finding in found.values() if finding is not None]
        said = {f"monitors/{name}": float(finding is not None) for name, finding in found.items()}
        said["monitors/skipped_updates"] = float(self.skips.batch)
        if self.skips.batch:
            announce(f"monitor max_skipped at step {step}: updates skipped as not finite: {self.skips.batch}")
        for finding in (finding for finding in fires if finding.begins):
            raises = " κ is raised while it fires." if self._does(finding) == "raise_kl_coef" else ""
            announce(describe(finding, step) + raises)
            self._note(finding, step)
        if any(self._does(finding) == "raise_kl_coef" for finding in fires):
            said["monitors/raised_kl_coef"] = float(raise_kl_coef(STEP, MOST))
        for finding in fires:
            if self._does(finding) == "stop":
                raise MonitorError(describe(finding, step))
        return said

    def _does(self, finding: Alert) -> str:
        return str(getattr(self.config, finding.monitor.name))

    def _note(self, finding: Alert, step: int) -> None:
        """Name the monitor in status.json."""
        if self.run is not None:
            name, before = finding.monitor.name, self.run.facts.get("monitors", {})
            count = int(self.watched[f"{name} episode"][2])
            self.run.know(monitors=before | {name: {"step": step, "episodes": count, "said": finding.said}})

    def prepare(self, step: int, rollouts: Rollouts) -> None:
        """Have this process's rollouts left behind if a function of the user's must be ended together with it."""
        if self.run is None or not self.modules or self.users.deadline.seconds is None:
            return
        run, place = self.run, crash_dump.place(self.run.path, step)
        status = {"stage": run.stage, "name": run.path.name, "status": "failed", **run.facts}

        def words(error: str) -> dict[str, str]:
            # another process's end is the run's: the launcher ends the main one before it can say so
            said = json.dumps(status | {"error": error}, indent=2) + "\n"
            return {str(place / "error.txt"): f"{error}\n", str(run.path / "status.json"): said}

        rows = crash_dump.lines(self.tokenizer, step, rollouts, {}, split=False)
        self.users.leave(
            {str(place / "rollouts.jsonl"): rows}, f"The rollouts are in {place}.", str(place / "traceback.txt"), words
        )

    @contextmanager
    def keeping(self, step: int, rollouts: Rollouts, *, alone: bool = False) -> Iterator[Scene]:
        """Save what is known of the batch when a part of the work on it fails with an error that a person can fix,
        or in code of the user's, and say in the error where it lies.

        Raises:
            UserCodeError: code of the user's raised. Other errors stay what they are.
        """
        scene = Scene(step, rollouts, alone)
        try:
            yield scene
        except (collectives.ProcessError, DiskError):
            raise
        except ApportionError as error:
            raise self._leave(scene, error) from error.__cause__
        except (Exception, SystemExit) as error:
            blamed = self._blamed(error)
            if blamed is None:
                raise
            raise self._leave(scene, raised(blamed, error), error) from error

    def _blamed(self, error: BaseException) -> str | None:
        """Return the name of the user's method whose module the error passed through, if any."""
        trace, found = error.__traceback__, None
        while trace is not None:
            found = self.modules.get(trace.tb_frame.f_globals.get("__name__", ""), found)
            trace = trace.tb_next
        return found

    def _leave(self, scene: Scene, error: ApportionError, cause: BaseException | None = None) -> ApportionError:
        """Save the scene and return the error with where it lies."""
        if self.run is None or error.saved or not (scene.alone or collectives.is_main()):
            return error
        columns, lacks = all_columns(scene)
        try:
            place = crash_dump.save(
                crash_dump.place(self.run.path, scene.step),
                crash_dump.lines(self.tokenizer, scene.step, scene.rollouts, columns, self.skips.rows),
                error,
                cause or error.__cause__,
                scene.metrics,
            )
            told = f"The rollouts are in {place}{lacks}."
        except DiskError as full:
            told = f"The rollouts could not be saved: {full}"
        except Exception as second:  # the first error is the one to tell
            told = f"The rollouts could not be saved ({type(second).__name__}: {' '.join(str(second).split())[:200]})."
        error.saved = told
        return error


def all_columns(scene: Scene) -> tuple[dict[str, Tensor], str]:
    """Return (every column of a scene that can be had, words on those that cannot): what failed may fail again."""
    columns, lacks = dict(scene.columns), []
    for name, make in scene.later.items():
        try:
            columns[name] = make(scene.rollouts)
        except Exception as error:  # the first error is the one to tell
            lacks.append(f"{name} ({type(error).__name__})")
    return columns, f", without {', '.join(lacks)}" if lacks else ""


def describe(finding: Alert, step: int) -> str:
    """Return what a monitor found in our one shape of messages."""
    monitor = finding.monitor
    fix = f"Likely causes: {monitor.causes}. {monitor.fix} (monitors.{monitor.name}, docs/monitors.md)."
    return format_problem(f"monitor {monitor.name} at step {step}", finding.said, monitor.expected, fix)


def announce(text: str) -> None:
    """Write a warning to stderr, in one of several processes alone."""
    if collectives.is_log_rank():
        stderr.write(f"warning: {text}\n")


def check_rows(what: str, values: Tensor, mask: Tensor) -> None:
    """Raise ScoreError that names the first rollout whose `values` (B,T) are not finite on its mask (B,T)."""
    bad = (mask & ~torch.isfinite(values)).any(dim=1)
    if bad.any():
        row = int(bad.nonzero()[0])
        got = float(values[row][mask[row] & ~torch.isfinite(values[row])][0])
        raise ScoreError(what, got, "finite numbers", FAILURE, row=row)


def check_metrics(step: int, metrics: Mapping[str, float]) -> None:
    """Raise ScoreError for a metric that is not finite."""
    for name, value in metrics.items():
        if not math.isfinite(value):
            fix = "The training diverged: lower optim.lr, or train in float32 (--dtype float32)."
            raise ScoreError(f"{name} at step {step}", float(value), "a finite number", fix)


def drop_unknown(metrics: Mapping[str, float], skipped: int) -> dict[str, float]:
    """Return the metrics of a batch with `skipped` updates without those that are not finite, which are counted.

    What the skipped updates' forward said is what was not finite; in any other batch it is an error to log.
    """
    if not skipped:
        return dict(metrics)
    kept = {name: value for name, value in metrics.items() if math.isfinite(value)}
    return kept | {"monitors/dropped_metrics": float(len(metrics) - len(kept))}
