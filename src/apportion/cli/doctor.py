"""`apportion doctor`: a run before it starts, a credit method of one's own, or what this machine gives a run."""

from __future__ import annotations

import os
import re
import sys
from typing import Any

from rich.console import Console
from rich.table import Table

from apportion.cli import checkup
from apportion.cli.arguments import load_value, split_flags
from apportion.errors import ConfigError
from apportion.system import cpu

HELP = """usage: apportion doctor [--config FILE.yaml] [--name value ...] [--fast] [--json]
       apportion doctor --credit NAME [--credit.key value ...]
       apportion doctor

With the settings of a run, from a file and flags as `apportion rl` takes them: check them, the prompts, both tokenizers
and both models, and say what is wrong and how to fix it. Each line of the table is one question:

  ok    it is as it should be; the number says how it was told
  warn  it may be meant; look at it
  fail  the run would stop, or learn something else than meant
  skip  the question does not arise, or what it depends on failed

With --credit alone: check a credit method against the contract that every one must keep, and show the smallest batch on
which it does not. Without anything: show the cores of this machine that a run would use.

  --fast          leave out what needs the models' weights: seconds instead of a minute (rl)
  --json          print one object {passed, counts, findings: [{name, level, found, fix}]} instead of a table
  --eval_prompts  prompts that the policy will be evaluated on: they may not be among those it learns from
  --labels        labelled texts (columns text and label) to test the reward model's order on; for one that was trained
                  by `apportion reward` its held-out texts are taken
  --stage         whose settings: rl, or reward for those of `apportion reward`
  --credit        package.module:function of yours, or a built-in name; `--credit.key value` are its settings

The exit code is 0 where nothing failed and 2 where something did. `apportion rl` asks the quick questions itself.

examples:
  apportion doctor --config recipes/imdb_abc.yaml
  apportion doctor --config run.yaml --policy my/model --fast
  apportion doctor --config run.yaml --json | jq '.findings[] | select(.level == "fail")'
  apportion doctor --credit my_credits:words --credit.mix 0.5
"""
WAITING = {  # what `cpu.configure_waiting` returns -> what it means
    "passive": "threads sleep while they wait: other tasks want these cores",
    "user": "as the environment says",
    "default": "OpenMP's default: threads spin for a while before they sleep",
}


def run(arguments: list[str]) -> int:
    """Check, print a table, and return 0 when every clause holds, else 2."""
    if any(word in ("-h", "--help") for word in arguments):
        sys.stdout.write(HELP)
        return 0
    if any(word.startswith("--") and not re.match(r"--credit($|[.=])", word) for word in arguments):
        return checkup.run(arguments)
    flags, _ = split_flags(arguments, ["credit"])
    options = dict(flags)
    if not flags:
        return machine()
    if not options.get("credit"):
        raise ConfigError("--credit", options.get("credit"), "a credit method", "Write package.module:function.")
    from apportion import credit

    settings = {name.partition(".")[2]: load_value(name, value) for name, value in flags if "." in name}
    return report(options["credit"], credit.make(options["credit"], settings))


def machine() -> int:
    """Print the cores of this machine and how a run would use them; return 0."""
    threads = cpu.configure_threads()
    table = Table("", "", title="cores")
    for name, value in {
        "cores": threads.cores.reason,
        "load": f"{os.getloadavg()[0]:.2f} tasks over the last minute",
        "threads": f"{threads.count} ({threads.source})",
        "waiting": WAITING[threads.waiting],
        "memory": "freed memory is kept" if cpu.keep_freed_memory() else "as the C library or the environment says",
    }.items():
        table.add_row(name, value)
    console = Console(markup=False, highlight=False, soft_wrap=True)
    console.print(table)
    for warning in threads.warnings:
        console.print(f"warning: {warning}")
    return 0


def report(name: str, made: Any) -> int:
    """Print what the contract says of a credit and return the exit code."""
    from apportion.testing import CLAUSES, violations

    broken = {violation.clause: violation for violation in violations(made)}
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
    """Return a small batch as Python that makes it again."""
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
