"""Reader of run folders, which tolerates absent and truncated files."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from apportion.data.formats import MAX_DEPTH, depth
from apportion.errors import DataError
from apportion.report.style import finite
from apportion.system import safe_yaml
from apportion.system.paths import link_outside, local_path

HOLDS = (
    "a run folder with metrics.jsonl, evaluation.json or diagnosis.json "
    "(beside config.yaml, status.json, rollouts.jsonl and samples.jsonl)"
)


@dataclass(frozen=True, kw_only=True)
class RunData:
    """The contents of one run folder.

    Attributes:
        path: the folder.
        name: from status.json, or the folder's own name.
        stage: "sft", "reward", "rl", "dpo", ...; empty when unknown.
        status: "running", "finished", "failed"; empty when unknown.
        config: the resolved configuration, nested; empty when absent.
        config_text: the text of config.yaml.
        metrics: one mapping a step.
        rollouts: logged rollouts with per-token values.
        samples: the evaluation's samples before and after training, in file order.
        evaluation: the evaluation's summary.
        diagnosis: the result of `apportion diagnose`.
        stopped: the crash dumps in stopped/: name, error and number of rollouts, which are also in `rollouts` where
            their step was not logged.
        notes: what was absent, skipped or unreadable, as sentences for the page.
    """

    path: Path
    name: str
    stage: str = ""
    status: str = ""
    config: Mapping[str, Any] = field(default_factory=dict)
    config_text: str = ""
    metrics: tuple[Mapping[str, Any], ...] = ()
    rollouts: tuple[Mapping[str, Any], ...] = ()
    samples: tuple[Mapping[str, Any], ...] = ()
    evaluation: Mapping[str, Any] = field(default_factory=dict)
    diagnosis: Mapping[str, Any] = field(default_factory=dict)
    stopped: tuple[Mapping[str, Any], ...] = ()
    notes: tuple[str, ...] = ()


def read_run(path: Path) -> RunData:
    """Return the contents of the run folder at `path`.

    Raises:
        DataError: `path` is not a folder, has no metrics, evaluation or diagnosis, cannot be read, or contains a link
            to outside: the page would show that file's content.
    """
    path = local_path(str(path), "run", DataError)
    try:
        return _read(path)
    except OSError as error:
        got, fix = f"{error.filename or path} ({error.strerror})", "Check the disk and the permissions."
        raise DataError("run", got, "a run folder that can be read", fix) from error


def _read(path: Path) -> RunData:
    if not path.is_dir():
        got = f"{path} ({'a file' if path.exists() else 'nothing there'})"
        raise DataError("run", got, HOLDS, "Give the folder that a stage wrote, for example runs/rl.")
    if link := link_outside(path):
        fix = "Remove it; the run folder itself may be a link."
        raise DataError("run", f"{link}, a link to {os.readlink(link)}", "a run folder without links to outside", fix)
    notes: list[str] = []
    metrics = _lines(path / "metrics.jsonl", notes)
    evaluation = _mapping(path / "evaluation.json", notes)
    diagnosis = _diagnosis(path / "diagnosis.json", notes)
    rollouts = _lines(path / "rollouts.jsonl", notes)
    stopped, dumped = _stopped(path / "stopped", {finite(row.get("step")) for row in rollouts}, notes)
    if not metrics and not evaluation and not diagnosis and not stopped:
        files = ", ".join(sorted(p.name for p in path.iterdir())[:8]) or "an empty folder"
        raise DataError("run", f"{path} ({files})", HOLDS, _fix(notes))
    status = _mapping(path / "status.json", notes)
    config, config_text = _config(path / "config.yaml", notes)
    return RunData(
        path=path,
        name=str(status.get("name") or path.resolve().name),
        stage=str(status.get("stage") or ""),
        status=str(status.get("status") or ""),
        config=config,
        config_text=config_text,
        metrics=metrics,
        rollouts=(*rollouts, *dumped),
        samples=_lines(path / "samples.jsonl", notes),
        evaluation=evaluation,
        diagnosis=diagnosis,
        stopped=stopped,
        notes=tuple(notes),
    )


def _stopped(
    folder: Path, logged: set[Any], notes: list[str]
) -> tuple[tuple[Mapping[str, Any], ...], list[Mapping[str, Any]]]:
    """Return (a summary of each crash dump, their rollouts that have credit and whose step was not logged)."""
    dumps: list[Mapping[str, Any]] = []
    rollouts: list[Mapping[str, Any]] = []
    for place in sorted(folder.glob("step-*")) if folder.is_dir() else ():
        rows = _lines(place / "rollouts.jsonl", notes)
        error = (_text(place / "error.txt", notes) or "").strip()
        dumps.append({"name": f"stopped/{place.name}", "error": error, "rollouts": len(rows)})
        rollouts += [row for row in rows if "credit" in row and finite(row.get("step")) not in logged]
    return tuple(dumps), rollouts


def _fix(notes: list[str]) -> str:
    return " ".join([*notes, "Train or evaluate into this folder first, or name another one."])


def _text(path: Path, notes: list[str]) -> str | None:
    if not path.is_file():
        return None
    raw = path.read_bytes()
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        # A killed run may stop inside a character; the complete part is still worth showing.
        notes.append(f"{path.name}: not valid UTF-8 at byte {error.start}; such bytes are shown as \ufffd.")
        return raw.decode("utf-8", errors="replace")


def _lines(path: Path, notes: list[str]) -> tuple[Mapping[str, Any], ...]:
    text = _text(path, notes)
    if text is None:
        return ()
    rows: list[Mapping[str, Any]] = []
    # Not splitlines(): model text may hold U+2028 and the like inside a JSON string.
    lines = text.split("\n")
    last = max((i for i, line in enumerate(lines) if line.strip()), default=-1)
    for i, line in enumerate(lines):
        if not line.strip():
            continue
        try:
            row = _json(line)
        except (ValueError, RecursionError):
            why = "the last line is cut off" if i == last else "not valid JSON"
            notes.append(f"{path.name}: line {i + 1} skipped ({why}).")
            continue
        if isinstance(row, dict):
            rows.append(row)
        else:
            notes.append(f"{path.name}: line {i + 1} skipped (a {type(row).__name__}, not an object).")
    return tuple(rows)


def _mapping(path: Path, notes: list[str]) -> Mapping[str, Any]:
    text = _text(path, notes)
    if text is None:
        return {}
    try:
        value = _json(text)
    except (ValueError, RecursionError) as error:
        notes.append(f"{path.name}: not valid JSON ({error}); left out.")
        return {}
    if isinstance(value, dict):
        return value
    notes.append(f"{path.name}: a {type(value).__name__}, not an object; left out.")
    return {}


def _json(text: str) -> Any:
    """Return the value of `text`. Raises ValueError or RecursionError where it is not JSON, or too deep."""
    value = json.loads(text)
    if text.count("[") + text.count("{") > MAX_DEPTH and depth(value) > MAX_DEPTH:
        raise ValueError(f"nested more than {MAX_DEPTH} deep")
    return value


def _diagnosis(path: Path, notes: list[str]) -> Mapping[str, Any]:
    """Return a diagnosis with those of its methods that are objects."""
    diagnosis = _mapping(path, notes)
    methods = diagnosis.get("methods", {})
    valid = {name: m for name, m in methods.items() if isinstance(m, dict)} if isinstance(methods, dict) else {}
    if not isinstance(methods, dict) or len(valid) < len(methods):
        notes.append(f"{path.name}: methods that are not objects; left out.")
    return {**diagnosis, "methods": valid} if diagnosis else diagnosis


def _config(path: Path, notes: list[str]) -> tuple[Mapping[str, Any], str]:
    text = _text(path, notes)
    if text is None:
        return {}, ""
    try:
        value = safe_yaml.load(text)
    except yaml.YAMLError as error:
        notes.append(f"{path.name}: not valid YAML ({str(error).splitlines()[0]}); shown as text.")
        return {}, text
    return (value if isinstance(value, dict) else {}), text
