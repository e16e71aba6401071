"""`apportion doctor --config FILE`: a run's settings, data and models checked before hours are spent on it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from apportion.cli.arguments import parse
from apportion.cli.terminal import console
from apportion.config import RewardConfig, RLConfig
from apportion.errors import ConfigError, unknown_name
from apportion.system import cpu

OWN = {"eval_prompts": None, "labels": None, "stage": "rl"}
SWITCHES = ("fast", "json")
STAGES = ("rl", "reward")
COLOURS = {"ok": "green", "warn": "yellow", "fail": "bold red", "skip": "dim"}


def own_flags(arguments: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """Return (the doctor's own flags and switches, the stage's flags). Raises ConfigError for a flag without value."""
    given: dict[str, Any] = dict(OWN) | dict.fromkeys(SWITCHES, False)
    rest, words = [], list(arguments)
    while words:
        word = words.pop(0)
        name, equals, value = word.removeprefix("--").partition("=")
        name = name.replace("-", "_")
        if not word.startswith("--") or name not in given:
            rest.append(word)
        elif name in SWITCHES:
            if equals:
                raise ConfigError(f"--{name}", value, "no value", f"Write --{name} alone.")
            given[name] = True
        else:
            if not equals and (not words or words[0].startswith("--")):
                raise ConfigError(f"--{name}", "nothing", "a value", f"Write --{name} VALUE.")
            given[name] = value if equals else words.pop(0)
    if given["stage"] not in STAGES:
        raise unknown_name("--stage", given["stage"], STAGES)
    return given, rest


def run(arguments: Sequence[str]) -> int:
    """Check a run's settings, print what was found, and return 0 where nothing failed, else 2."""
    given, rest = own_flags(arguments)
    if given["stage"] == "reward":
        refuse_unused(given)
    config = parse(RewardConfig if given["stage"] == "reward" else RLConfig, "doctor", rest).config
    threads = cpu.configure_threads(config.threads)

    from apportion.stages.doctor.checkup import checkup, failed
    from apportion.stages.doctor.checkup_reward import checkup_reward

    more = {name: given[name] for name in ("fast", "eval_prompts", "labels")}
    with progress() as tell:
        if given["stage"] == "reward":
            findings = checkup_reward(config, threads=threads, tell=tell)
        else:
            findings = checkup(config, threads=threads, tell=tell, **more)
    if given["json"]:
        sys.stdout.write(json.dumps(as_object(findings, given), ensure_ascii=False) + "\n")
    else:
        show(findings)
    return 2 if failed(findings) else 0


def refuse_unused(given: dict[str, Any]) -> None:
    """Raise ConfigError for a flag of the rl stage's checks beside `--stage reward`."""
    for name in ("eval_prompts", "labels"):
        if given[name] is not None:
            raise ConfigError(f"--{name}", given[name], "nothing with --stage reward", "Leave it out.")


@contextmanager
def progress() -> Iterator[Callable[[str], None]]:
    """Give a function that shows the name of the check that is being asked, on a terminal."""
    screen = console()
    if not screen.is_terminal:
        yield lambda name: None
        return
    with screen.status("checking") as shown:
        yield lambda name: shown.update(f"checking {name}")


def as_object(findings: Sequence[Any], given: dict[str, Any]) -> dict[str, Any]:
    """Return the findings as one JSON object."""
    counts = {level: sum(one.level == level for one in findings) for level in COLOURS}
    return {
        "stage": given["stage"],
        "fast": given["fast"],
        "passed": counts["fail"] == 0,
        "counts": counts,
        "findings": [one._asdict() for one in findings],
    }


def show(findings: Sequence[Any]) -> None:
    """Print a table of the findings, and below it what to fix."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    screen = Console(highlight=False, markup=False)
    table = Table("check", "", "found", show_lines=False)
    for one in findings:
        table.add_row(one.name, Text(one.level, style=COLOURS[one.level]), one.found)
    screen.print(table)
    for one in findings:
        if one.fix:
            screen.print(f"\n{one.level} {one.name}: {one.fix}", soft_wrap=True)
    counted = ", ".join(f"{n} {level}" for level in COLOURS if (n := sum(f.level == level for f in findings)))
    screen.print(f"\n{counted}", soft_wrap=True)
