"""Monitoring of a run: monitors over its metrics, their state, and the checks of metrics that are not finite."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from apportion import monitors
from apportion.config.monitors import MonitorsConfig
from apportion.distributed import launcher
from apportion.errors import MonitorError, ScoreError, format_problem
from apportion.monitors import Alert
from apportion.system import stderr
from apportion.training.nonfinite import SkippedUpdates
from apportion.training.run_folder import RunFolder
from apportion.types import State

FACTOR, LIMIT = 1.1, 10.0  # κ grows by this factor a batch while a monitor raises it, up to this many times its start


class Monitoring:
    """The monitors of one run and its count of skipped updates.

    Attributes:
        config: what each monitor does. nonfinite: counts updates that are not finite. watched: the monitors' state.
        run: the run folder whose status.json names what fires; None (a loop without one): nowhere.
    """

    def __init__(self, config: MonitorsConfig, run: RunFolder | None = None) -> None:
        self.config, self.run = config, run
        self.monitors = [make() for name, make in monitors.MONITORS.items() if getattr(config, name) != "off"]
        self.nonfinite, self.watched = SkippedUpdates(config.max_skipped), monitors.init(self.monitors)

    @property
    def state(self) -> State:
        """Return what a checkpoint holds of the monitors."""
        return self.watched | self.nonfinite.state

    def load_state(self, state: State) -> None:
        """Restore a checkpoint's `state`; a monitor that was off when it was written starts afresh."""
        self.nonfinite.load_state(state)
        self.watched |= {name: state[name] for name in self.watched if name in state}

    def check(
        self, step: int, metrics: Mapping[str, float], rows: int, raise_kl_coef: Callable[[float, float], bool]
    ) -> dict[str, float]:
        """Check the metrics of batch `step` of `rows` rollouts and return the monitors' own metrics.

        A monitor that begins to fire is named on stderr and in status.json. One that raises κ calls
        `raise_kl_coef(factor, limit)`, which returns whether κ rose.

        Raises:
            MonitorError: a monitor that is set to stop fires.
        """
        visible = {k: v for k, v in metrics.items() if rows > 1 or k != "objective/scores_std"}  # one rollout has none
        results, self.watched = monitors.observe(self.monitors, visible, self.watched)
        alerts = [alert for alert in results.values() if alert is not None]
        own = {f"monitors/{name}": float(alert is not None) for name, alert in results.items()}
        own["monitors/skipped_updates"] = float(self.nonfinite.batch)
        if self.nonfinite.batch:
            warn(f"monitor max_skipped at step {step}: updates skipped as not finite: {self.nonfinite.batch}")
        for alert in (alert for alert in alerts if alert.begins):
            raises = " κ is raised while it fires." if self._action(alert) == "raise_kl_coef" else ""
            warn(describe(alert, step) + raises)
            self._record(alert, step)
        if any(self._action(alert) == "raise_kl_coef" for alert in alerts):
            own["monitors/raised_kl_coef"] = float(raise_kl_coef(FACTOR, LIMIT))
        for alert in alerts:
            if self._action(alert) == "stop":
                raise stop_error(alert, step)
        return own

    def _action(self, alert: Alert) -> str:
        return str(getattr(self.config, alert.monitor.name))

    def _record(self, alert: Alert, step: int) -> None:
        """Name the monitor in status.json."""
        if self.run is not None:
            name, before = alert.monitor.name, self.run.status_fields.get("monitors", {})
            count = int(self.watched[f"{name} episode"][2])
            entry = {"step": step, "episodes": count, "message": alert.message}
            self.run.update_status(monitors=before | {name: entry})


def stop_error(alert: Alert, step: int) -> MonitorError:
    """Return the error of an alert that stops the run."""
    return MonitorError(*_parts(alert, step))


def describe(alert: Alert, step: int) -> str:
    """Return the text of an alert, in the shape of every error."""
    return format_problem(*_parts(alert, step))


def _parts(alert: Alert, step: int) -> tuple[str, str, str, str]:
    monitor = alert.monitor
    fix = f"Likely causes: {monitor.causes}. {monitor.fix} (monitors.{monitor.name}, docs/monitors.md)."
    return f"monitor {monitor.name} at step {step}", alert.message, monitor.expected, fix


def warn(text: str) -> None:
    """Write a warning to stderr, from the log rank only."""
    if launcher.is_log_rank():
        stderr.write(f"warning: {text}\n")


def check_metrics(step: int, metrics: Mapping[str, float]) -> None:
    """Raise ScoreError for a metric that is not finite."""
    for name, value in metrics.items():
        if not math.isfinite(value):
            fix = "The training diverged: lower optim.lr, or train in float32 (--dtype float32)."
            raise ScoreError(f"{name} at step {step}", float(value), "a finite number", fix)


def drop_nonfinite(metrics: Mapping[str, float], skipped: int) -> dict[str, float]:
    """Return the metrics of a batch with `skipped` updates without those that are not finite, which are counted.

    They come from the forward of the skipped updates; in any other batch such a metric is an error.
    """
    if not skipped:
        return dict(metrics)
    finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
    return finite | {"monitors/dropped_metrics": float(len(metrics) - len(finite))}
