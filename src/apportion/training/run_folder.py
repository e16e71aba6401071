"""The run folder of a stage: settings, status, logs, and a README that explains its files."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import yaml
from filelock import FileLock

from apportion.config.schema.renamed import check_renamed
from apportion.distributed import launcher
from apportion.errors import ApportionError, ConfigError, DiskError, Interrupted, ScoreError
from apportion.system import disk, safe_yaml, stderr
from apportion.system.disk import explain_disk_errors as explain_disk_errors
from apportion.system.disk import require_space as require_space
from apportion.system.lock import ReadOnlyLock, lock_folder
from apportion.system.paths import link_outside
from apportion.training.logs import JsonlLogs

T = TypeVar("T")

README = """# {name}: a run of `apportion {stage}`

| file | what it is |
|---|---|
| config.yaml | every setting, resolved; `apportion {stage} --config config.yaml` repeats the run |
| status.json | running, interrupted, finished or failed; the step it was resumed from |
| progress.json | the step, the number of steps, seconds so far and left |
| metrics.jsonl | one line a step |
| rollouts.jsonl | sampled texts with each token's credit, reward, advantage and KL |
| samples.jsonl, evaluation.json | texts before and after on the same prompts, and what was measured |
| answers/, logprobs/, scores/ | of `apportion evaluate`: each policy's answers, and what they were measured by |
| evaluation.html, tokens/ | of `apportion evaluate`: the page, and a page of token heat maps a prompt |
| diagnosis.json | what `apportion diagnose` measured of each method |
| checkpoints/ | the newest states to resume from |
| stopped/ | the current rollouts when a monitor or an error stopped the run |
| final/ | the trained model in Hugging Face format, with its card |
| trackers.json, tensorboard/ | what trackers continue from; tensorboard's event files |
| hub.json | where the final model was uploaded |

`apportion report {path}` draws it.
"""
STARTED = (
    "metrics.jsonl",
    "samples.jsonl",
    "samples.parquet",
    "answers",
    "checkpoints",
    "final",
)  # any of them is work done
# settings of where, whether and how safely a run is done, not of what it computes: they may change when it is resumed
NOT_COMPARED = {"output", "fresh", "config", "device", "threads", "checkpoint_every", "keep_checkpoints", "disk_wait"}
NOT_COMPARED |= {"monitors", "max_skipped", "trackers", "tracker_project", "push_to_hub", "hub_private", "license"}
FRESH_FILES = {
    ".status.json.tmp",
    "status.json",
    ".config.yaml.tmp",
}  # may be all there is of a run killed while it was opened


class RunFolder:
    """One run folder. Every write is flushed; while the disk is full a write waits, then raises a DiskError.

    Attributes:
        status_fields: further fields of status.json, such as the number of threads.
        disk_wait: seconds to wait for space on a full disk.
        stop_waiting: asked while it waits; True ends the waiting.
        lock: keeps other processes out while this one writes the run.
    """

    def __init__(self, path: Path, stage: str) -> None:
        self.path, self.stage = path, stage
        self.status_fields: dict[str, Any] = {}
        self.disk_wait = 0.0
        self.stop_waiting: Callable[[], bool] = lambda: False
        self.lock: FileLock | ReadOnlyLock | None = None

    @property
    def logs(self) -> JsonlLogs:
        """The logs; made at each access, since a reference back would keep the folder locked after its last use."""
        return JsonlLogs(self.path, self.retry_when_full)

    @classmethod
    def open(cls, output: str, stage: str, config: Mapping[str, Any], *, fresh: bool = False) -> RunFolder:
        """Make or reopen the folder `output` for `config`.

        Raises:
            ConfigError: the folder holds something else, or a run with other settings (it names the first difference),
                or another process is writing it.
            DiskError: it cannot be written to.
        """
        run = cls(Path(output).expanduser(), stage)
        with explain_disk_errors(run.path):
            run._refuse_foreign()  # nor is a lock put beside what is no run
        run.lock, warning = lock_folder(run.path)
        try:
            with explain_disk_errors(run.path):
                run._prepare(output, config, fresh, warning)
        except BaseException:
            run.lock = None
            raise
        return run

    def _prepare(self, output: str, config: Mapping[str, Any], fresh: bool, warning: str | None) -> None:
        if fresh and self.is_run:
            self._discard()
        self._refuse_foreign()
        self.refuse_links()
        if self.started:
            self._refuse_other(config)
        self._make()
        for old in (*self.path.glob("final.old"), *self.path.glob("checkpoints/step-*.old")):
            disk.recover(old.with_suffix(""))
        if self.finished:
            self.lock = None
            return
        new = not self.started
        if new:
            self.write_status("running")  # first: a folder without it is nobody's
        self._write_settings(config)
        if new:
            self._write("README.md", README.format(name=self.path.name, stage=self.stage, path=output))
        before = self.read("status.json")
        self.status_fields = {name: before[name] for name in ("threads", "checkpoint", "monitors") if name in before}
        self.write_status("running")
        if warning is not None:
            self.warn(f"apportion: warning: {warning}.\n")

    def _make(self) -> None:
        """Make the folder, or the one that a link leads to, durably."""
        real = Path(os.path.realpath(self.path))
        if not real.is_dir():
            real.mkdir(parents=True)
            with suppress(PermissionError):  # a folder may be written to and not read
                disk.sync(real.parent)

    def _write_settings(self, config: Mapping[str, Any]) -> None:
        """Write config.yaml where it does not say `config` yet: settings of NOT_COMPARED may change on the way."""
        text = safe_yaml.dump(dict(config))
        path = self.path / "config.yaml"
        if not path.is_file() or path.read_text(encoding="utf-8", errors="replace") != text:
            self._write("config.yaml", text)

    def _discard(self) -> None:
        """Remove the folder. A kill meanwhile leaves it whole, renamed, or partly emptied but recognised."""
        real = Path(os.path.realpath(self.path))
        discarded = real.parent / f".{real.name}.discarded"
        shutil.rmtree(discarded, ignore_errors=True)
        try:
            if Path.cwd() == real:
                raise OSError("it is the working directory")
            os.replace(real, discarded)
        except OSError:  # nor can a mount point be moved, or a folder in one that may not be written to
            self._empty(real)
        else:
            shutil.rmtree(discarded)

    def _empty(self, folder: Path) -> None:
        with suppress(DiskError):  # a kill during this must not leave a folder that looks finished
            self.write_status("running")
        last = ("config.yaml", "status.json")  # while these are there it is recognised as a run
        for path in sorted(folder.iterdir(), key=lambda path: last.index(path.name) if path.name in last else -1):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()

    @property
    def is_run(self) -> bool:
        """Whether the folder was made by a run, this one or another."""
        return all((self.path / name).is_file() for name in ("config.yaml", "status.json"))

    @property
    def started(self) -> bool:
        """Whether anything was learned in it; until then a fixed configuration may take its place."""
        # a diagnosis learns nothing: it is its end that must not pass for that of other settings
        return self.finished or any((self.path / name).exists() for name in STARTED)

    @contextmanager
    def record_failure(self) -> Iterator[None]:
        """Write status "failed" with the error's message, or "interrupted" by the user, and re-raise."""
        try:
            yield
        except (KeyboardInterrupt, Interrupted):
            self._end("interrupted")
            raise
        except (Exception, SystemExit) as error:
            kind = "" if isinstance(error, ApportionError) else f"{type(error).__name__}: "
            self._end("failed", error=f"{kind}{error}")
            raise

    def _end(self, status: str, **more: Any) -> None:
        self.disk_wait = 0.0
        with suppress(DiskError):  # the disk may be what failed
            self.write_status(status, **more)

    def _refuse_foreign(self) -> None:
        if self.path.exists() and not self.path.is_dir():
            raise ConfigError("output", str(self.path), "a folder", "It is a file: choose another name.")
        if self.path.is_dir() and any(self.path.iterdir()) and not self.is_run and not self._just_created:
            fix = "Choose another --output, or empty it."
            raise ConfigError("output", str(self.path), "a new folder or one of this run", fix)

    def refuse_links(self) -> None:
        """Raise ConfigError for a link in the folder that leads out of it: what is written there goes elsewhere."""
        link = link_outside(self.path)
        if link is not None:
            fix = "Remove it; to use another disk, make the run folder itself a link."
            raise ConfigError("output", f"{link}, a link to {os.readlink(link)}", "a folder without", fix)

    @property
    def _just_created(self) -> bool:
        """Whether the folder holds only the first words of a run that was killed while it was opened."""
        if {p.name for p in self.path.iterdir()} - FRESH_FILES:
            return False
        return not (self.path / "status.json").is_file() or "stage" in self.read("status.json")

    def _refuse_other(self, config: Mapping[str, Any]) -> None:
        fix = "Choose another --output, or pass --fresh to start over in this one."
        stage = self.read("status.json").get("stage")
        if stage != self.stage:
            got = f"{self.path} of `apportion {stage}`"
            raise ConfigError("output", got, f"a folder of `apportion {self.stage}`", fix)
        try:
            before = flat(safe_yaml.load((self.path / "config.yaml").read_text(encoding="utf-8")))
        except (yaml.YAMLError, UnicodeDecodeError, AttributeError) as error:
            got = f"{self.path}/config.yaml ({' '.join(str(error).split())})"
            raise ConfigError("output", got, "the settings of the run in it", fix) from error
        check_renamed(before, f"{self.path}/config.yaml", fix)
        now = flat(config)
        for key in sorted(set(before) | set(now)):
            if key.split(".")[0] not in NOT_COMPARED and before.get(key) != now.get(key):
                expected = f"the settings of the run in it ({key} was {before.get(key)!r})"
                raise ConfigError("output", f"{self.path} with {key} {now.get(key)!r}", expected, fix)

    @property
    def finished(self) -> bool:
        """Whether the run came to its end."""
        return self.read("status.json").get("status") == "finished"

    def read(self, name: str) -> dict[str, Any]:
        """Return the JSON object in file `name`, or {} when it is absent. Raises ConfigError for a damaged one."""
        path = self.path / name
        try:
            value: Any = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
            if not isinstance(value, dict):
                raise ValueError(f"a {type(value).__name__}")
        except (ValueError, RecursionError) as error:
            fix = "Choose another folder, or pass --fresh to start over in this one."
            raise ConfigError(str(path), str(error), "a JSON object", fix) from error
        return value

    def write_status(self, status: str, **more: Any) -> None:
        """Write status.json: the stage, the status and whatever else is known."""
        content = {"stage": self.stage, "name": self.path.name, "status": status, **self.status_fields, **more}
        try:
            self.write_json("status.json", content)
        finally:
            if status != "running":  # nothing is written after that
                self.lock = None

    def update_status(self, **fields: Any) -> None:
        """Add `fields` to status.json of the running run, for the rest of it."""
        self.status_fields |= fields
        self.write_status("running")

    def log(
        self, step: int, metrics: Mapping[str, float], rollouts: Iterable[Mapping[str, Any]] = ()
    ) -> dict[str, float]:
        """Append one line to metrics.jsonl and a line a rollout to rollouts.jsonl; return the metrics as written.

        Raises:
            ScoreError: a metric is not finite. DiskError: a full disk.
        """
        for name, value in metrics.items():
            if not math.isfinite(value):
                fix = "The training diverged: lower optim.lr, or train in float32 (--dtype float32)."
                raise ScoreError(f"{name} at step {step}", float(value), "a finite number", fix)
        rows = list(rollouts)
        if rows:
            self.logs.append("rollouts.jsonl", rows)
        # significant digits, not decimals: learning rates and KL estimates are small
        written = {name: float(f"{value:.7g}") for name, value in metrics.items()}
        self.logs.append("metrics.jsonl", [{"step": step, **written}])
        return written

    def write_json(self, name: str, value: Mapping[str, Any]) -> None:
        """Write a JSON object to file `name`, at once or not at all."""
        text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        self.retry_when_full(lambda: self._write(name, text), len(text))

    def write_progress(self, **fields: float | int | None) -> None:
        """Write progress.json, for whoever watches; a disk that cannot take it now is no reason to stop."""
        with suppress(OSError):
            self._write("progress.json", json.dumps(fields) + "\n")

    def retry_when_full(self, work: Callable[[], T], wanted: int) -> T:
        """Return what `work` does, which writes `wanted` bytes here; where the disk is full it waits (`disk_wait`)."""
        return disk.retry_when_full(
            self.path, work, wanted=wanted, seconds=self.disk_wait, stop=self.stop_waiting, warn=self.warn
        )

    def warn(self, line: str) -> None:
        """Write a line about this run to stderr, from the log rank only."""
        if launcher.is_log_rank():
            stderr.write(line)

    def _write(self, name: str, text: str) -> None:
        part = self.path / f".{name}.tmp"
        # the bytes of a path that are no UTF-8 become escapes, as JSON has them
        part.write_text(text, encoding="utf-8", errors="backslashreplace")
        disk.sync(part)
        os.replace(part, self.path / name)


class FollowerLogs(JsonlLogs):
    """Logs that another process writes."""

    def append(self, name: str, rows: Iterable[Mapping[str, Any]]) -> None:
        """Write nothing; the rows are still made, so that an error in them is raised here too."""
        list(rows)

    def truncate(self, positions: Mapping[str, Mapping[str, Any]]) -> None:
        """Truncate nothing."""


class FollowerFolder(RunFolder):
    """The folder of a run that another process writes: this process reads it, and its own writes do nothing."""

    @property
    def logs(self) -> JsonlLogs:
        """Logs that are read only."""
        return FollowerLogs(self.path, self.retry_when_full)

    def _write(self, name: str, text: str) -> None:
        return None


def flat(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return {"a.b": value} of a nested mapping; tuples become lists, as YAML has them."""
    out: dict[str, Any] = {}
    for key, value in nested.items():
        if isinstance(value, Mapping) and value:
            out |= flat(value, f"{prefix}{key}.")
        else:
            out[f"{prefix}{key}"] = list(value) if isinstance(value, tuple) else value
    return out
