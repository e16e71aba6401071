"""Entries of a comparison: finished runs, models and files of given answers, each with a name of its own."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePath
from typing import Any

import yaml

from apportion.config import EvaluateConfig
from apportion.errors import ConfigError, DataError
from apportion.models.loading import locate
from apportion.system import safe_yaml
from apportion.system.paths import local_path
from apportion.training.run_folder import RunFolder

STARTS = {"rl": "policy", "sft": "model", "dpo": "model"}  # the setting with the model that a run of a stage began with
SAMPLES = ("samples.jsonl", "samples.parquet")
FIXED = ("final", "best", "checkpoints")  # parts of a path that name no policy
LONGEST = 120  # bytes of a name
EXPECTED = "the folder of a finished sft, dpo or rl run, a model, or a file of answers"


@dataclass(frozen=True)
class Entry:
    """One side of the comparison.

    Attributes:
        name: in tables, and of its files. given: as the settings have it.
        folder: the model's folder or hub id; of given answers their file.
        is_model: whether it is sampled from; else its answers are given.
        settings: those of the run that trained it, empty without one. stage: of that run.
    """

    name: str
    given: str
    folder: str
    is_model: bool
    settings: Mapping[str, Any]
    stage: str = ""

    @property
    def start(self) -> str | None:
        """The model that its run started from, None where no run says."""
        start = self.settings.get(STARTS.get(self.stage, ""))
        return start if isinstance(start, str) else None


def open_entries(config: EvaluateConfig) -> tuple[Entry, list[Entry]]:
    """Return (the start, the policies without it). Loads nothing.

    Raises:
        ConfigError: a policy twice, no start, or nothing but the start. DataError: a run that is not finished, or of a
            stage without a policy. ModelError: no model.
    """
    policies = [open_entry("policies", given, config.checkpoint) for given in config.policies or ()]
    twice = next((one for i, one in enumerate(policies) if any(same(one, other) for other in policies[:i])), None)
    if twice is not None:
        got = f"{twice.given} twice: {', '.join(config.policies or ())}"
        raise ConfigError("policies", got, "each policy once", "Remove one of them.")
    start = open_entry("start", config.start or _recorded(policies), config.checkpoint)
    others = [one for one in policies if not same(one, start)]
    if not others:
        fix = "Name another policy, or another --start."
        raise ConfigError("policies", list(config.policies or ()), f"one that is not the start, {start.given}", fix)
    named = with_names([start, *others])
    return named[0], named[1:]


def same(one: Entry, other: Entry) -> bool:
    """Whether two entries are the same model, or the same answers."""
    return one.is_model == other.is_model and _real(one.folder) == _real(other.folder)


def _real(folder: str) -> str:
    return str(Path(folder).resolve()) if Path(folder).exists() else folder


def _recorded(policies: Sequence[Entry]) -> str:
    """Return the recorded start of the first policy that has one. Raises ConfigError where none has."""
    start = next((one.start for one in policies if one.start is not None), None)
    if start is None:
        expected = "what the policies are measured against: none of them is a run that says what it started from"
        raise ConfigError("start", None, expected, "Add --start MODEL, such as --start smollm2.")
    return start


def open_entry(field: str, given: str, checkpoint: str) -> Entry:
    """Return the entry of the setting `field` that `given` names; its own name is not yet unique."""
    path = local_path(given, field, ConfigError)
    if path.is_file():
        return Entry(label(given), given, str(path), False, {})
    run = RunFolder(path, "evaluate")
    if not path.is_dir() or not run.is_run:
        return Entry(label(given), given, locate(field, given), True, {})
    status = run.read("status.json")
    stage = str(status.get("stage") or "")
    run.refuse_links()
    if stage not in (*STARTS, "sample"):
        raise DataError(field, f"{given}, of `apportion {stage}`", EXPECTED, "Name a run that trained a policy.")
    if status.get("status") != "finished":
        fix = f"Finish it with `apportion {stage} --config {path}/config.yaml`, or leave it out."
        raise DataError(field, f"{given}, which is {status.get('status')}", EXPECTED, fix)
    if stage == "sample":
        file = next((path / name for name in SAMPLES if (path / name).is_file()), path / SAMPLES[0])
        return Entry(label(given), given, str(file), False, {})
    folder = path / _checkpoint(field, path, stage, checkpoint)
    return Entry(label(given), given, locate(field, str(folder)), True, _settings(field, path), stage)


def _checkpoint(field: str, path: Path, stage: str, wanted: str) -> str:
    """Return the folder in a run that holds its policy; sft and dpo keep only the final one."""
    if wanted == "final" or stage != "rl":
        return "final"
    if not (path / "best").is_dir():
        got, fix = f"{path} without best/", "Use --checkpoint final, or train it with --keep_best.every."
        raise DataError(field, got, "a run with the policy that keep_best kept", fix)
    return "best"


def _settings(field: str, path: Path) -> Mapping[str, Any]:
    try:
        settings = safe_yaml.load((path / "config.yaml").read_text(encoding="utf-8"))
        if not isinstance(settings, Mapping):
            raise ValueError("no mapping of settings")
    except (yaml.YAMLError, ValueError, OSError) as error:
        got = f"{path / 'config.yaml'} ({' '.join(str(error).split())[:200]})"
        raise DataError(field, got, "the settings of a run", "Name its final/ folder instead.") from error
    return settings


def label(given: str) -> str:
    """Return the name of what `given` names: the last part of its path that says something."""
    parts = _parts(given)
    return parts[-1] if parts else "policy"


def _parts(given: str) -> list[str]:
    names = [part for part in PurePath(given).parts if part not in ("/", ".", "..")]
    if names and PurePath(names[-1]).suffix in (".jsonl", ".json", ".parquet", ".arrow", ".gz"):
        stem = re.sub(r"(\.(jsonl|json|parquet|arrow|gz))+$", "", names[-1])
        names = [*names[:-1], *([] if stem == "samples" and len(names) > 1 else [stem])]
    kept = [name for name in names if name not in FIXED] or names
    return [_short(re.sub(r"[^\w.:-]", "_", name)) for name in kept]


def _short(name: str) -> str:
    """Return a name that a file can have with an ending behind it: the middle of a long one is left out."""
    return name if len(name.encode()) <= LONGEST else f"{name[:12]}…{name[-12:]}"


def with_names(entries: Sequence[Entry]) -> list[Entry]:
    """Return the entries with names of their own: folders above are added where names repeat, then a number."""
    depth = 1
    names = [label(one.given) for one in entries]
    while len(set(names)) < len(names) and depth < 8:
        depth += 1
        again = [name for name in names if names.count(name) > 1]
        longer = [_short("-".join(_parts(one.given)[-depth:])) for one in entries]
        names = [new if name in again else name for name, new in zip(names, longer, strict=True)]
    final = [f"{n}-{names[: i + 1].count(n)}" if names.count(n) > 1 else n for i, n in enumerate(names)]
    return [replace(one, name=name) for one, name in zip(entries, final, strict=True)]
