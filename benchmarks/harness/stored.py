"""Results that an interrupted benchmark keeps: a JSON file of settings and parts, and the commands run for them."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from apportion.errors import ConfigError
from benchmarks.harness.environment import environment


def named(source: str | None) -> str | None:
    """Return what stands for `source` in settings: the SHA-256 of a file's bytes, else the name itself."""
    path = Path(source or "")
    return hashlib.sha256(path.read_bytes()).hexdigest() if source and path.is_file() else source


def load_parts(path: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the finished parts in `path`, none where it is absent.

    Raises:
        ConfigError: the file holds parts of other settings, or is none of a benchmark's.
    """
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        parts, before = dict(found["parts"]), dict(found["settings"])
    except (ValueError, KeyError, TypeError) as error:
        fix = "Name another file."
        raise ConfigError("--output", str(path), "a file that this benchmark wrote, or a new one", fix) from error
    for name in sorted({*before, *settings}):
        if before.get(name) != settings.get(name):
            fix = f"Give that again, or another --output than {path}."
            raise ConfigError(f"--{name}", settings.get(name), f"{before.get(name)}, as the parts there have", fix)
    return parts


def save_parts(path: Path, settings: Mapping[str, Any], parts: Mapping[str, Any], **more: Any) -> None:
    """Write settings, parts and `more` to `path`; an interrupted write leaves the file as it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    part.write_text(json.dumps({"settings": dict(settings), "parts": dict(parts), **more}, indent=1) + "\n")
    os.replace(part, path)


def run_module(*words: object, threads: int, log: Path) -> None:
    """Run `python -m WORDS` in a process of its own; its output goes to `log`.

    Raises:
        ConfigError: it failed; its exit code and its last lines are quoted.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    # -P: the current folder is not on the path; `environment` puts this checkout there
    command = [sys.executable, "-P", "-m", *map(str, words)]
    with log.open("w", encoding="utf-8") as out:
        done = subprocess.run(
            command, env=environment(threads), stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT
        )
    if done.returncode != 0:
        lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines()]
        last = " | ".join([line for line in lines if line][-3:])
        fix = f"{log} has its whole output; exit code -9 means that memory ran out."
        raise ConfigError("process", f"{words[0]}: exit code {done.returncode}: {last}", "a run that finishes", fix)
