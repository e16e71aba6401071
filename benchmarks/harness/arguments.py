"""Command lines of the benchmarks: a dataclass of settings from flags or YAML, and errors as one line (exit code 2)."""

from __future__ import annotations

import argparse
import json
import re
import sys
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

import yaml
from pydantic import TypeAdapter, ValidationError

from apportion.errors import ApportionError, ConfigError
from apportion.system.disk import explain_disk_errors

C = TypeVar("C")


def run_command(
    name: str,
    kind: type[C],
    check: Callable[[C], None],
    action: Callable[[C, bool], int],
    examples: str,
    arguments: Sequence[str] | None = None,
) -> int:
    """Run `python -m benchmarks.NAME` and return its exit code: 2 for an error, 130 for Ctrl-C; one message on stderr.

    Every field of `kind` is a flag (`-` and `_` are the same) and a key of the YAML file that `--config` names.
    `--dry_run` prints the settings.

    Args:
        check: raises ConfigError for settings that cannot work.
        action: called with the settings and whether `--json` was given; returns the exit code.
    """
    words = [_with_underscores(word) for word in (sys.argv[1:] if arguments is None else arguments)]
    options = vars(_parser(name, kind, examples).parse_args(words))
    try:
        config = _settings(kind, options)
        check(config)
        if options["dry_run"]:
            sys.stdout.write(yaml.safe_dump(asdict(config), sort_keys=False))  # type: ignore[call-overload]
            return 0
        return action(config, options["json"])
    except ApportionError as error:
        sys.stderr.write(f"benchmarks.{name}: {error}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write(f"benchmarks.{name}: interrupted; it writes no checkpoints: the same command starts over.\n")
        return 130


def _with_underscores(word: str) -> str:
    flag = re.match(r"--[a-z][a-z_-]*", word)
    return word if flag is None else f"--{flag[0][2:].replace('-', '_')}{word[flag.end() :]}"


def _parser(name: str, kind: type, examples: str) -> argparse.ArgumentParser:
    documentation = kind.__doc__ or ""
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{name}",
        usage="%(prog)s [--config FILE.yaml] [--name value ...]",
        description=documentation.split("\n\n")[0].strip(),
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="FILE", help="a YAML file of settings; flags override it")
    parser.add_argument("--dry_run", action="store_true", help="print the settings and stop")
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")
    described = dict(re.findall(r"^ {8}(\w+): ((?:.|\n {12})+)", documentation, flags=re.MULTILINE))
    for field in fields(kind):
        text = " ".join(described.get(field.name, "").split()).replace("%", "%%")
        parser.add_argument(f"--{field.name}", metavar="VALUE", help=text, default=argparse.SUPPRESS)
    return parser


def _settings(kind: type[C], options: Mapping[str, Any]) -> C:
    """Return the settings from the YAML file and the flags. Raises ConfigError that names the setting."""
    values: dict[str, Any] = {}
    if options["config"] is not None:
        try:
            values = yaml.safe_load(Path(options["config"]).read_text(encoding="utf-8")) or {}
        except (OSError, yaml.YAMLError) as error:
            fix = f"It says: {' '.join(str(error).split())}."
            raise ConfigError("--config", options["config"], "a file of YAML", fix) from error
    hints = get_type_hints(kind)
    for name in hints.keys() & options.keys():
        values[name] = _value(name, options[name], hints[name])
    try:
        return TypeAdapter(kind).validate_python(values, strict=False, extra="forbid")
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"])) or "settings"
        fix = "`--help` lists every setting."
        raise ConfigError(field, first["input"], first["msg"].removeprefix("Input should be "), fix) from error


def _value(name: str, text: str, hint: Any) -> Any:
    """Return the value of a flag: text where the setting is a text, else YAML."""
    kinds = get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if str in kinds:
        return None if types.NoneType in kinds and text in ("null", "~") else text
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(name, text, "a YAML value", "Quote it.") from error


def write_json(path: str | Path, result: Mapping[str, Any]) -> None:
    """Write a result file, creating its folder. Raises DiskError."""
    file = Path(path).expanduser()
    with explain_disk_errors(file):
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
