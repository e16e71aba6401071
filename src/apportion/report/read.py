"""Reads a run folder for the report, tolerating whatever part of it is absent or cut off."""

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
from apportion.report.numbers import finite
from apportion.system import safe_yaml
from apportion.system.paths import link_outside, local_path

HOLDS = (
    "a run folder with metrics.jsonl, evaluation.json or diagnosis.json "
    "(beside config.yaml, status.json, rollouts.jsonl and samples.jsonl)"
)


@dataclass(frozen=True, kw_only=True)
class RunData:
    """What one run folder says.

    Attributes:
        path: the folder.
        name: from status.json, or the folder's own name.
        stage: "sft", "reward", "rl", "dpo", ...; empty when unknown.
        status: "running", "finished", "failed"; empty when unknown.
        config: the resolved configuration, nested; empty when absent.
        config_text: config.yaml as it stands.
        metrics: one mapping a step.
        rollouts: logged rollouts with per-token values.
        samples: the evaluation's samples before and after, in file order.
        evaluation: the evaluation's summary.
        diagnosis: what `apportion diagnose` found.
        stopped: each folder of stopped/: its name, its error and the number of its rollouts, which `rollouts` hold
            too where their step was not logged.
        notes: what was absent, skipped or unreadable, as sentences for the reader of the page.
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
    """Return what the run folder at `path` says.

    Raises:
        DataError: `path` is not a folder, holds no metrics, evaluation or diagnosis, cannot be read, or has a link out
            of it in it: whatever that leads to would stand in the page.
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
        raise DataError("run", f"{link}, a link to {os.readlink(link)}", "a run folder without", fix)
    notes: list[str] = []
    metrics = _lines(path / "metrics.jsonl", notes)
    evaluation = _mapping(path / "evaluation.json", notes)
    diagnosis = _diagnosis(path / "diagnosis.json", notes)
    rollouts = _lines(path / "rollouts.jsonl", notes)
    stopped, left = _stopped(path / "stopped", {finite(row.get("step")) for row in rollouts}, notes)
    if not metrics and not evaluation and not diagnosis and not stopped:
        found = ", ".join(sorted(p.name for p in path.iterdir())[:8]) or "an empty folder"
        raise DataError("run", f"{path} ({found})", HOLDS, _fix(notes))
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
        rollouts=(*rollouts, *left),
        samples=_lines(path / "samples.jsonl", notes),
        evaluation=evaluation,
        diagnosis=diagnosis,
        stopped=stopped,
        notes=tuple(notes),
    )


def _stopped(
    folder: Path, logged: set[Any], notes: list[str]
) -> tuple[tuple[Mapping[str, Any], ...], list[Mapping[str, Any]]]:
    """Return (what each folder of a stopped step says, its rollouts whose credit is known and step was not logged)."""
    found: list[Mapping[str, Any]] = []
    left: list[Mapping[str, Any]] = []
    for place in sorted(folder.glob("step-*")) if folder.is_dir() else ():
        rows = _lines(place / "rollouts.jsonl", notes)
        error = (_text(place / "error.txt", notes) or "").strip()
        found.append({"name": f"stopped/{place.name}", "error": error, "rollouts": len(rows)})
        left += [row for row in rows if "credit" in row and finite(row.get("step")) not in logged]
    return tuple(found), left


def _fix(notes: list[str]) -> str:
    return " ".join([*notes, "Train or evaluate into this folder first, or name another one."])


def _text(path: Path, notes: list[str]) -> str | None:
    if not path.is_file():
        return None
    raw = path.read_bytes()
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        # A run that was killed may stop inside a character; the complete part is still worth showing.
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
    """Return the value of `text`. Raises ValueError or RecursionError for what is no JSON, or deeper than MAX_DEPTH."""
    value = json.loads(text)
    if text.count("[") + text.count("{") > MAX_DEPTH and depth(value) > MAX_DEPTH:
        raise ValueError(f"nested more than {MAX_DEPTH} deep")
    return value


def _diagnosis(path: Path, notes: list[str]) -> Mapping[str, Any]:
    """Return what a diagnosis says; of its methods, those of which it says anything."""
    found = _mapping(path, notes)
    methods = found.get("methods", {})
    told = {name: said for name, said in methods.items() if isinstance(said, dict)} if isinstance(methods, dict) else {}
    if not isinstance(methods, dict) or len(told) < len(methods):
        notes.append(f"{path.name}: methods that are no objects; left out.")
    return {**found, "methods": told} if found else found


def _config(path: Path, notes: list[str]) -> tuple[Mapping[str, Any], str]:
    text = _text(path, notes)
    if text is None:
        return {}, ""
    try:
        value = safe_yaml.load(text)
    except yaml.YAMLError as error:
        notes.append(f"{path.name}: not valid YAML ({str(error).splitlines()[0]}); shown as it stands.")
        return {}, text
    return (value if isinstance(value, dict) else {}), text
