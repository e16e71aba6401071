"""The run folder: settings, metrics and rollouts as they come, and a note that explains what lies in it."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError

from apportion import plain_yaml
from apportion.errors import ApportionError, ConfigError, DiskError, ScoreError, message
from apportion.paths import link_outside

README = """# {name}: a run of `apportion {stage}`

| file | what it is |
|---|---|
| config.yaml | every setting, resolved; `apportion {stage} --config config.yaml` repeats the run |
| status.json | running, finished or failed |
| metrics.jsonl | one line a step |
| rollouts.jsonl | sampled texts with each token's credit, reward, advantage and KL |
| samples.jsonl, evaluation.json | texts before and after on the same prompts, and what was measured |
| diagnosis.json | what `apportion diagnose` found of each method |
| checkpoints/ | the newest states to go on from |
| final/ | the trained model in Hugging Face format |

`apportion report {path}` draws it.
"""
# settings that say where and whether, not what
PLACES = ("output", "fresh", "config", "threads")


class Run:
    """One run folder. Every write is flushed; a full disk is a DiskError that says how to go on."""

    def __init__(self, path: Path, stage: str) -> None:
        self.path, self.stage = path, stage
        self.facts: dict[str, Any] = {}  # what status.json says besides, such as the number of threads

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
                shutil.rmtree(run.path)
            run._refuse_foreign()
            if run.started:
                run._refuse_other(config)
            run.path.mkdir(parents=True, exist_ok=True)
            if not run.started:
                run._write("config.yaml", plain_yaml.dump(dict(config)))
                run._write("README.md", README.format(name=run.path.name, stage=stage, path=output))
            if not run.finished:
                threads = run.read("status.json").get("threads")
                run.facts = {} if threads is None else {"threads": threads}
                run.status("running")
        return run

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
        """Write status "failed" with the message of an error that the user can mend, and raise it again."""
        try:
            yield
        except ApportionError as error:
            with suppress(DiskError):  # the disk may be what failed
                self.status("failed", error=str(error))
            raise

    def _refuse_foreign(self) -> None:
        if self.path.exists() and not self.path.is_dir():
            raise ConfigError(message("output", str(self.path), "a folder", "It is a file: choose another name."))
        if self.path.is_dir() and any(self.path.iterdir()) and not self.is_run:
            mend = "Choose another --output, or empty it."
            raise ConfigError(message("output", str(self.path), "a new folder or one of this run", mend))
        self.refuse_links()

    def refuse_links(self) -> None:
        """Raise ConfigError for a link in the folder that leads out of it: what is written there goes elsewhere."""
        link = link_outside(self.path)
        if link is not None:
            mend = "Remove it; to use another disk, make the run folder itself a link."
            raise ConfigError(message("output", f"{link}, a link to {os.readlink(link)}", "a folder without", mend))

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
        """Append JSON lines to file `name`."""
        with explained(self.path), open(self.path / name, "a", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)

    def write_json(self, name: str, value: Mapping[str, Any]) -> None:
        """Write a JSON object to file `name`, at once or not at all."""
        with explained(self.path):
            self._write(name, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")

    def _write(self, name: str, text: str) -> None:
        part = self.path / f".{name}.tmp"
        part.write_text(text, encoding="utf-8")
        os.replace(part, self.path / name)

    def sizes(self) -> dict[str, int]:
        """Return the byte sizes of the growing logs, to go back to when a run is resumed."""
        names = ("metrics.jsonl", "rollouts.jsonl")
        return {n: (self.path / n).stat().st_size for n in names if (self.path / n).is_file()}

    def cut(self, sizes: Mapping[str, int]) -> None:
        """Cut the logs back to `sizes`; logs not named there are removed."""
        for name in ("metrics.jsonl", "rollouts.jsonl"):
            path = self.path / name
            if name in sizes:
                os.truncate(path, sizes[name])
            else:
                path.unlink(missing_ok=True)


class Follower(Run):
    """The folder of a run that another process writes: this one reads it, and its own writes go nowhere."""

    def append(self, name: str, rows: Iterable[Mapping[str, Any]]) -> None:
        """Write nothing; the rows are still made, so that an error in them is found here too."""
        list(rows)

    def _write(self, name: str, text: str) -> None:
        return None

    def cut(self, sizes: Mapping[str, int]) -> None:
        """Cut nothing."""


class explained:  # a context manager
    """Turn a failed write into a DiskError that names the folder and the mend."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        reason = getattr(error, "strerror", None) or str(error)
        if isinstance(error, SafetensorError) and "os error" in reason:  # its writer raises no OSError
            number = re.search(r"os error (\d+)", reason)
            error = OSError(int(number[1]) if number else 0, reason)
        if not isinstance(error, OSError) or isinstance(error, DiskError):
            return
        mends = {
            errno.ENOSPC: "Free some space, then run the same command again: it goes on from the last checkpoint.",
            errno.EACCES: "Choose a folder you may write to.",
            errno.EROFS: "Choose a folder that is not read-only.",
        }
        mend = mends.get(error.errno or 0, "Choose another --output.")
        raise DiskError(message("output", f"{self.path} ({reason})", "a folder to write to", mend)) from error


def need_space(path: Path, wanted: int) -> None:
    """Raise DiskError unless `wanted` bytes are free where `path` is or will be."""
    place = path.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < wanted:
        came = f"{path} with {free / 1e6:.0f} MB free"
        mend = "Free some space or choose another --output."
        raise DiskError(message("output", came, f"at least {wanted / 1e6:.0f} MB for models and checkpoints", mend))


def flat(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return {"a.b": value} of a nested mapping; tuples become lists, as YAML has them."""
    out: dict[str, Any] = {}
    for key, value in nested.items():
        if isinstance(value, Mapping) and value:
            out |= flat(value, f"{prefix}{key}.")
        else:
            out[f"{prefix}{key}"] = list(value) if isinstance(value, tuple) else value
    return out
