"""Command lines of the benchmarks: a dataclass of settings from flags or YAML, and errors as one line (exit code 2)."""

from __future__ import annotations

import json
import re
import sys
from argparse import RawDescriptionHelpFormatter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, TypeVar

import yaml
from jsonargparse import ArgumentParser

from apportion.errors import ApportionError
from apportion.system.disk import explained

C = TypeVar("C")


def run_command(
    name: str,
    kind: type[C],
    check: Callable[[C], None],
    action: Callable[[C, bool], int],
    examples: str,
    arguments: Sequence[str] | None = None,
) -> int:
    """Run `python -m benchmarks.NAME` and return its exit code; 2 for an error, with one message on stderr.

    Every field of `kind` is a flag (`-` and `_` are the same) and a key of the YAML file that `--config` names.
    `--dry_run` prints the settings.

    Args:
        check: raises ConfigError for settings that cannot work.
        action: called with the settings and whether `--json` was given; returns the exit code.
    """
    words = [_with_underscores(word) for word in (sys.argv[1:] if arguments is None else arguments)]
    parsed = _parser(name, kind, examples).parse_args(words)
    config = kind(**{field.name: parsed[field.name] for field in fields(kind)})  # type: ignore[arg-type]
    try:
        check(config)
        if parsed.dry_run:
            sys.stdout.write(yaml.safe_dump(asdict(config), sort_keys=False))  # type: ignore[call-overload]
            return 0
        return action(config, parsed.json)
    except ApportionError as error:
        sys.stderr.write(f"benchmarks.{name}: {error}\n")
        return 2


def _with_underscores(word: str) -> str:
    flag = re.match(r"--[a-z][a-z_-]*", word)
    return word if flag is None else flag[0].replace("-", "_").replace("__", "--", 1) + word[flag.end() :]


def _parser(name: str, kind: type, examples: str) -> ArgumentParser:
    parser = ArgumentParser(
        prog=f"python -m benchmarks.{name}",
        description=(kind.__doc__ or "").split("\n\n")[0].strip(),
        epilog=examples,
        formatter_class=RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", action="config", help="a YAML file of settings; flags override it")
    parser.add_argument("--dry_run", action="store_true", help="print the settings and stop")
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")
    parser.add_class_arguments(kind, None)
    return parser


def write_json(path: str | Path, result: Mapping[str, Any]) -> None:
    """Write a result file, creating its folder. Raises DiskError."""
    file = Path(path).expanduser()
    with explained(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def progress_lines(total: int) -> Callable[[int, str], None]:
    """Return a callback `(done, text)` that prints a line on stderr for about every fiftieth of `total`."""
    printed = -1

    def on_progress(done: int, text: str) -> None:
        nonlocal printed
        if done * 50 // total > printed * 50 // total or printed < 0:
            sys.stderr.write(f"{done}/{total}  {text}\n")
            printed = done

    return on_progress


def print_line(text: str) -> None:
    """Print one line on stderr."""
    sys.stderr.write(f"{text}\n")
