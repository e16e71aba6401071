"""The run folder: settings, metrics and rollouts as they come, and a note that explains what lies in it."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import yaml

from apportion import disk, parallel, plain_yaml
from apportion.disk import explained as explained
from apportion.disk import need_space as need_space
from apportion.errors import ApportionError, ConfigError, DiskError, Interrupted, ScoreError, message
from apportion.paths import link_outside

T = TypeVar("T")

README = """# {name}: a run of `apportion {stage}`

| file | what it is |
|---|---|
| config.yaml | every setting, resolved; `apportion {stage} --config config.yaml` repeats the run |
| status.json | running, interrupted, finished or failed; the step that it went on from |
| metrics.jsonl | one line a step |
| rollouts.jsonl | sampled texts with each token's credit, reward, advantage and KL |
| samples.jsonl, evaluation.json | texts before and after on the same prompts, and what was measured |
| diagnosis.json | what `apportion diagnose` found of each method |
| checkpoints/ | the newest states to go on from |
| stopped/ | the rollouts at hand when a guard or an error stopped the run |
| final/ | the trained model in Hugging Face format |

`apportion report {path}` draws it.
"""
# settings that say where, whether and how safely, not what; a run that a guard stopped may go on under another one
PLACES = ("output", "fresh", "config", "threads", "checkpoint_every", "keep_checkpoints", "disk_wait", "guards")
LOGS = ("metrics.jsonl", "rollouts.jsonl")
NEWBORN = {".status.json.tmp", "status.json", ".config.yaml.tmp"}  # what a run killed while it was opened may leave
TAIL = 1 << 16  # bytes before a log's end whose sum a checkpoint holds


class Run:
    """One run folder. Every write is flushed; a full disk is waited for, then a DiskError that says how to go on.

    Attributes:
        facts: what status.json says besides, such as the number of threads.
        disk_wait: seconds to wait for space on a full disk.
        hurried: asked while it waits; True ends the waiting.
    """

    def __init__(self, path: Path, stage: str) -> None:
        self.path, self.stage = path, stage
        self.facts: dict[str, Any] = {}
        self.disk_wait = 0.0
        self.hurried: Callable[[], bool] = lambda: False

    @classmethod
    def open(cls, output: str, stage: str, config: Mapping[str, Any], *, fresh: bool = False) -> Run:
        """Make or reopen the folder `output` for `config`.

        Raises:
            ConfigError: the folder holds something else, or a run with other settings (it names the first difference).
            DiskError: it cannot be written to.
        """
        run = cls(Path(output).expanduser(), stage)
        with explained(run.path):
            if fresh and run.is_run:
                run._discard()
            run._refuse_foreign()
            if run.started:
                run._refuse_other(config)
            run.path.mkdir(parents=True, exist_ok=True)
            for old in (*run.path.glob("final.old"), *run.path.glob("checkpoints/step-*.old")):
                disk.recover(old.with_suffix(""))
            if not run.started:
                run.status("running")  # first: a folder without it is nobody's
                run._write("config.yaml", plain_yaml.dump(dict(config)))
                run._write("README.md", README.format(name=run.path.name, stage=stage, path=output))
            if not run.finished:
                before = run.read("status.json")
                run.facts = {name: before[name] for name in ("threads", "checkpoint", "guards") if name in before}
                run.status("running")
        return run

    def _discard(self) -> None:
        """Remove the folder; killed meanwhile, it is gone by its name already, or whole."""
        gone = self.path.with_name(f".{self.path.name}.discarded")
        shutil.rmtree(gone, ignore_errors=True)
        try:
            os.replace(self.path, gone)
        except OSError:  # a mount point cannot be moved
            gone = self.path
        shutil.rmtree(gone)

    @property
    def is_run(self) -> bool:
        """Whether the folder was made by a run, this one or another."""
        return all((self.path / name).is_file() for name in ("config.yaml", "status.json"))

    @property
    def started(self) -> bool:
        """Whether anything was learned in it; until then a mended configuration may take its place."""
        # a diagnosis learns nothing: it is its end that must not pass for that of other settings
        return self.finished or any((self.path / name).exists() for name in ("metrics.jsonl", "checkpoints", "final"))

    @contextmanager
    def failing(self) -> Iterator[None]:
        """Write status "failed" with the message of an error that the user can mend, "interrupted" where the user
        ended it, and raise it again."""
        try:
            yield
        except ApportionError as error:
            self._end("failed", error=str(error))
            raise
        except (KeyboardInterrupt, Interrupted):
            self._end("interrupted")
            raise

    def _end(self, status: str, **more: Any) -> None:
        self.disk_wait = 0.0
        with suppress(DiskError):  # the disk may be what failed
            self.status(status, **more)

    def _refuse_foreign(self) -> None:
        if self.path.exists() and not self.path.is_dir():
            raise ConfigError(message("output", str(self.path), "a folder", "It is a file: choose another name."))
        if self.path.is_dir() and any(self.path.iterdir()) and not self.is_run and not self._newborn:
            mend = "Choose another --output, or empty it."
            raise ConfigError(message("output", str(self.path), "a new folder or one of this run", mend))
        self.refuse_links()

    def refuse_links(self) -> None:
        """Raise ConfigError for a link in the folder that leads out of it: what is written there goes elsewhere."""
        link = link_outside(self.path)
        if link is not None:
            mend = "Remove it; to use another disk, make the run folder itself a link."
            raise ConfigError(message("output", f"{link}, a link to {os.readlink(link)}", "a folder without", mend))

    @property
    def _newborn(self) -> bool:
        """Whether the folder holds only the first words of a run that was killed while it was opened."""
        if {p.name for p in self.path.iterdir()} - NEWBORN:
            return False
        return not (self.path / "status.json").is_file() or "stage" in self.read("status.json")

    def _refuse_other(self, config: Mapping[str, Any]) -> None:
        again = "Choose another --output, or pass --fresh to start over in this one."
        stage = self.read("status.json").get("stage")
        if stage != self.stage:
            came = f"{self.path} of `apportion {stage}`"
            raise ConfigError(message("output", came, f"a folder of `apportion {self.stage}`", again))
        try:
            before = flat(plain_yaml.load((self.path / "config.yaml").read_text(encoding="utf-8")))
        except (yaml.YAMLError, UnicodeDecodeError, AttributeError) as error:
            came = f"{self.path}/config.yaml ({' '.join(str(error).split())})"
            raise ConfigError(message("output", came, "the settings of the run in it", again)) from error
        now = flat(config)
        for key in sorted(set(before) | set(now)):
            if key.split(".")[0] not in PLACES and before.get(key) != now.get(key):
                expected = f"the settings of the run in it ({key} was {before.get(key)!r})"
                raise ConfigError(message("output", f"{self.path} with {key} {now.get(key)!r}", expected, again))

    @property
    def finished(self) -> bool:
        """Whether the run came to its end."""
        return self.read("status.json").get("status") == "finished"

    def read(self, name: str) -> dict[str, Any]:
        """Return the JSON object in file `name`, or {} when it is absent. Raises ConfigError for a damaged one."""
        path = self.path / name
        try:
            found: Any = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
            if not isinstance(found, dict):
                raise ValueError(f"a {type(found).__name__}")
        except (ValueError, RecursionError) as error:
            mend = "Choose another folder, or pass --fresh to start over in this one."
            raise ConfigError(message(str(path), str(error), "a JSON object", mend)) from error
        return found

    def status(self, status: str, **more: Any) -> None:
        """Write status.json: the stage, the status and whatever else is known."""
        said = {"stage": self.stage, "name": self.path.name, "status": status, **self.facts, **more}
        self.write_json("status.json", said)

    def know(self, **facts: Any) -> None:
        """Have status.json say `facts` of the running run from now on, to the end."""
        self.facts |= facts
        self.status("running")

    def log(self, step: int, metrics: Mapping[str, float], rollouts: Iterable[Mapping[str, Any]] = ()) -> None:
        """Append one line to metrics.jsonl and a line a rollout to rollouts.jsonl.

        Raises:
            ScoreError: a metric is not finite. DiskError: a full disk.
        """
        for name, value in metrics.items():
            if not math.isfinite(value):
                mend = "The training diverged: lower optim.lr, or train in float32 (--dtype float32)."
                raise ScoreError(message(f"{name} at step {step}", float(value), "a finite number", mend))
        rows = list(rollouts)
        if rows:
            self.append("rollouts.jsonl", rows)
        # significant digits, not decimals: learning rates and KL estimates are small
        self.append("metrics.jsonl", [{"step": step, **{k: float(f"{v:.7g}") for k, v in metrics.items()}}])

    def append(self, name: str, rows: Iterable[Mapping[str, Any]]) -> None:
        """Append JSON lines to file `name`: all of them, or none where the disk is full."""
        data = "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows).encode()
        self.patiently(lambda: self._append(name, data), len(data))

    def _append(self, name: str, data: bytes) -> None:
        handle = os.open(self.path / name, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            before = os.fstat(handle).st_size
            try:
                while data:
                    data = data[os.write(handle, data) :]
            except OSError:
                os.ftruncate(handle, before)  # half a line must not stay
                raise
        finally:
            os.close(handle)

    def write_json(self, name: str, value: Mapping[str, Any]) -> None:
        """Write a JSON object to file `name`, at once or not at all."""
        text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        self.patiently(lambda: self._write(name, text), len(text))

    def patiently(self, work: Callable[[], T], wanted: int) -> T:
        """Return what `work` does, which writes `wanted` bytes here; where the disk is full it waits (`disk_wait`)."""
        return disk.patiently(self.path, work, wanted=wanted, seconds=self.disk_wait, stop=self.hurried, say=self.say)

    def say(self, line: str) -> None:
        """Write a line about this run to stderr; one of several processes alone does."""
        if parallel.speaks():
            sys.stderr.write(line)
            sys.stderr.flush()

    def _write(self, name: str, text: str) -> None:
        part = self.path / f".{name}.tmp"
        part.write_text(text, encoding="utf-8")
        disk.sync(part)
        os.replace(part, self.path / name)

    def marks(self) -> dict[str, dict[str, Any]]:
        """Return where the growing logs end now, durably: {name: {"size": bytes, "tail": sha256 of the last ones}}."""
        there = [name for name in LOGS if (self.path / name).is_file()]
        for name in there:
            disk.sync(self.path / name)
        return {name: self._mark(name, (self.path / name).stat().st_size) for name in there}

    def _mark(self, name: str, end: int) -> dict[str, Any]:
        with (self.path / name).open("rb") as file:
            file.seek(max(0, end - TAIL))
            return {"size": end, "tail": hashlib.sha256(file.read(min(end, TAIL))).hexdigest()}

    def lost(self, marks: Mapping[str, Mapping[str, Any]]) -> str | None:
        """Return what is wrong with the logs at `marks`, None when all that stood before them is there."""
        for name, mark in marks.items():
            path = self.path / name
            length = path.stat().st_size if path.is_file() else 0
            if length < mark["size"]:
                return f"{name} has {length} of the {mark['size']} bytes that it had"
            if self._mark(name, mark["size"]) != mark:
                return f"{name} has other bytes before byte {mark['size']} than it had"
        return None

    def cut(self, marks: Mapping[str, Mapping[str, Any]]) -> None:
        """Cut the logs back to `marks`; logs not named there are removed."""
        for name in LOGS:
            path = self.path / name
            if name in marks:
                os.truncate(path, marks[name]["size"])
            else:
                path.unlink(missing_ok=True)


class Follower(Run):
    """The folder of a run that another process writes: this one reads it, and its own writes go nowhere."""

    def append(self, name: str, rows: Iterable[Mapping[str, Any]]) -> None:
        """Write nothing; the rows are still made, so that an error in them is found here too."""
        list(rows)

    def _write(self, name: str, text: str) -> None:
        return None

    def cut(self, marks: Mapping[str, Mapping[str, Any]]) -> None:
        """Cut nothing."""


def flat(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return {"a.b": value} of a nested mapping; tuples become lists, as YAML has them."""
    out: dict[str, Any] = {}
    for key, value in nested.items():
        if isinstance(value, Mapping) and value:
            out |= flat(value, f"{prefix}{key}.")
        else:
            out[f"{prefix}{key}"] = list(value) if isinstance(value, tuple) else value
    return out
