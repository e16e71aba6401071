"""`apportion doctor`: checks of a run before it starts, of a credit method, or of this machine's processor cores."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from apportion.cli.arguments import load_value, parse, split_flags
from apportion.cli.terminal import console as stderr_console
from apportion.config import DPOConfig, LabelConfig, RewardConfig, RLConfig, SFTConfig
from apportion.errors import ConfigError, unknown_name
from apportion.system import cpu

HELP = """usage: apportion doctor [--config FILE.yaml] [--name value ...] [--fast] [--json]
       apportion doctor --credit NAME [--credit.key value ...]
       apportion doctor

With the settings of a run, from a file and flags as `apportion rl` takes them: check the settings, the prompts, both
tokenizers and both models, and report what is wrong and how to fix it. Each line of the table is one check:

  ok    as expected; the message gives the measured number
  warn  possibly intended; worth a look
  fail  the run would stop, or learn something other than intended
  skip  the check does not apply, or one that it depends on failed

With only --credit: check a credit method against the contract of all credit methods, and print the smallest batch that
breaks it. Without arguments: print the processor cores that a run would use on this machine.

  --fast          skip the checks that load model weights: seconds instead of a minute (rl)
  --json          print one object {passed, counts, findings: [{name, level, message, fix}]} instead of a table
  --eval_prompts  prompts of the later evaluation: they may not be among the training prompts
  --labels        labelled texts (as for `reward --data`) to check the order of the reward model's scores; default: its
                  held-out texts, where `apportion reward` trained it
  --stage         whose settings: rl, or reward, sft, dpo, label for those of that command
  --credit        your package.module:function, or a built-in name; `--credit.key value` are its settings

The exit code is 0 where nothing failed and 2 where something did. `apportion rl` runs the quick checks itself.

examples:
  apportion doctor --config recipes/rl/imdb_abc.yaml
  apportion doctor --config run.yaml --policy my/model --fast
  apportion doctor --config run.yaml --json | jq '.findings[] | select(.level == "fail")'
  apportion doctor --credit my_credits:words --credit.mix 0.5
"""
WAITING = {  # `cpu.configure_waiting` -> what it means
    "passive": "threads sleep while they wait: other tasks use these cores",
    "user": "as the environment says",
    "default": "OpenMP's default: threads spin for a while before they sleep",
}
FLAGS = {"eval_prompts": None, "labels": None, "stage": "rl"}
SWITCHES = ("fast", "json")
STAGES: dict[str, Any] = {
    "rl": RLConfig,
    "reward": RewardConfig,
    "sft": SFTConfig,
    "dpo": DPOConfig,
    "label": LabelConfig,
}
COLOURS = {"ok": "green", "warn": "yellow", "fail": "bold red", "skip": "dim"}


def run(arguments: list[str]) -> int:
    """Run the checks, print a table, and return 0 when none failed, else 2."""
    if any(word in ("-h", "--help") for word in arguments):
        sys.stdout.write(HELP)
        return 0
    if any(word.startswith("--") and not re.match(r"--credit($|[.=])", word) for word in arguments):
        return check_run(arguments)
    flags, _ = split_flags(arguments, ["credit"])
    options = dict(flags)
    if not flags:
        return print_cores()
    if not options.get("credit"):
        raise ConfigError("--credit", options.get("credit"), "a credit method", "Write package.module:function.")
    from apportion import credit

    settings = {name.partition(".")[2]: load_value(name, value) for name, value in flags if "." in name}
    return print_contract(options["credit"], credit.make(options["credit"], settings))


def check_run(arguments: Sequence[str]) -> int:
    """Check the run with these settings, print the findings, and return the exit code."""
    options, rest = split_options(arguments)
    if options["stage"] != "rl":
        refuse_unused(options)
    config: Any = parse(STAGES[options["stage"]], "doctor", rest).config
    threads = cpu.configure_threads(getattr(config, "threads", None))

    from apportion.stages.doctor.findings import FAIL

    with progress() as on_check:
        findings = findings_of(config, options, threads, on_check)
    if options["json"]:
        sys.stdout.write(json.dumps(to_json(findings, options), ensure_ascii=False) + "\n")
    else:
        print_findings(findings)
    return 2 if any(one.level == FAIL for one in findings) else 0


def findings_of(config: Any, options: dict[str, Any], threads: Any, on_check: Callable[[str], None]) -> Sequence[Any]:
    """Run the checks of the stage that `options` name."""
    stage = options["stage"]
    if stage == "label":
        from apportion.label.checks import check_label

        return check_label(config, on_check=on_check)
    if stage in ("sft", "dpo"):
        from apportion.stages.doctor.supervised import check_supervised

        return check_supervised(config, threads=threads, on_check=on_check)
    if stage == "reward":
        from apportion.stages.doctor.reward import check_reward

        return check_reward(config, threads=threads, on_check=on_check)
    from apportion.stages.doctor.rl import check_rl

    chosen = {name: options[name] for name in ("fast", "eval_prompts", "labels")}
    return check_rl(config, threads=threads, on_check=on_check, **chosen)


def split_options(arguments: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """Return (the options of `doctor` itself, the settings of the run). Raises ConfigError for a flag without value."""
    options: dict[str, Any] = dict(FLAGS) | dict.fromkeys(SWITCHES, False)
    rest, words = [], list(arguments)
    while words:
        word = words.pop(0)
        name, equals, value = word.removeprefix("--").partition("=")
        name = name.replace("-", "_")
        if not word.startswith("--") or name not in options:
            rest.append(word)
        elif name in SWITCHES:
            if equals:
                raise ConfigError(f"--{name}", value, "no value", f"Write --{name} without a value.")
            options[name] = True
        else:
            if not equals and (not words or words[0].startswith("--")):
                raise ConfigError(f"--{name}", "nothing", "a value", f"Write --{name} VALUE.")
            options[name] = value if equals else words.pop(0)
    if options["stage"] not in STAGES:
        raise unknown_name("--stage", options["stage"], STAGES)
    return options, rest


def refuse_unused(options: dict[str, Any]) -> None:
    """Raise ConfigError for flags that only `--stage rl` has a use for."""
    for name in ("eval_prompts", "labels"):
        if options[name] is not None:
            raise ConfigError(f"--{name}", options[name], f"nothing with --stage {options['stage']}", "Leave it out.")


@contextmanager
def progress() -> Iterator[Callable[[str], None]]:
    """Yield a function that shows the name of the current check on a terminal."""
    screen = stderr_console()
    if not screen.is_terminal:
        yield lambda name: None
        return
    with screen.status("checking") as status:
        yield lambda name: status.update(f"checking {name}")


def to_json(findings: Sequence[Any], options: dict[str, Any]) -> dict[str, Any]:
    """Return the findings as one JSON object."""
    counts = {level: sum(one.level == level for one in findings) for level in COLOURS}
    return {
        "stage": options["stage"],
        "fast": options["fast"],
        "passed": counts["fail"] == 0,
        "counts": counts,
        "findings": [one._asdict() for one in findings],
    }


def print_findings(findings: Sequence[Any]) -> None:
    """Print a table of the findings, then the fixes."""
    screen = Console(highlight=False, markup=False)
    table = Table("check", "", "result", show_lines=False)
    for one in findings:
        table.add_row(one.name, Text(one.level, style=COLOURS[one.level]), one.message)
    screen.print(table)
    for one in findings:
        if one.fix:
            screen.print(f"\n{one.level} {one.name}: {one.fix}", soft_wrap=True)
    counts = ", ".join(f"{n} {level}" for level in COLOURS if (n := sum(f.level == level for f in findings)))
    screen.print(f"\n{counts}", soft_wrap=True)


def print_cores() -> int:
    """Print the cores of this machine and how a run would use them; return 0."""
    threads = cpu.configure_threads()
    table = Table("", "", title="cores")
    for name, value in {
        "cores": threads.cores.reason,
        "load": f"{os.getloadavg()[0]:.2f} tasks over the last minute",
        "threads": f"{threads.count} ({threads.source})",
        "waiting": WAITING[threads.waiting],
        "memory": "freed memory is kept" if cpu.keep_freed_memory() else "default of the C library or the environment",
    }.items():
        table.add_row(name, value)
    console = Console(markup=False, highlight=False, soft_wrap=True)
    console.print(table)
    for warning in threads.warnings:
        console.print(f"warning: {warning}")
    return 0


def print_contract(name: str, method: Any) -> int:
    """Print which clauses of the contract a credit method keeps, and return the exit code."""
    from apportion.testing import CLAUSES, violations

    broken = {violation.clause: violation for violation in violations(method)}
    console = Console(markup=False, highlight=False, soft_wrap=True)
    table = Table("clause", "", title=f"contract of {name}")
    for clause in CLAUSES:
        table.add_row(clause, "FAIL" if clause in broken else "ok")
    console.print(table)
    for violation in broken.values():
        console.print(f"\n{violation.clause}: {violation.message}.\nThe smallest batch that shows it:")
        console.print(describe(violation.case))
    return 2 if broken else 0


def describe(case: Any) -> str:
    """Return a small batch as Python code that builds it."""
    rollouts = case.rollouts
    lines = [
        f"  mask    = {rollouts.mask.int().tolist()}",
        f"  rewards = {rounded(case.rewards)}",
        f"  scores  = {rounded(rollouts.scores)}",
        f"  ids     = {rollouts.response_ids.tolist()}",
    ]
    return "\n".join(lines + [f"  evidence[{name!r}] = {rounded(value)}" for name, value in rollouts.evidence.items()])


def rounded(values: Any) -> Any:
    """Return a tensor as nested lists of numbers with 4 digits."""
    if values.dim() > 1:
        return [rounded(row) for row in values]
    return [round(float(v), 4) for v in values]
