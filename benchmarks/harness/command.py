"""`apportion bench`: speed beside released packages, and whether runs survive being killed and running long."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from apportion.cli.arguments import parse, show
from apportion.cli.terminal import note
from apportion.errors import ConfigError, unknown_name
from benchmarks.harness.settings import ENOUGH, SpeedConfig, check

HELP = """usage: apportion bench NAME [options]

  speed   seconds and memory of a batch, ours and a released trainer's, at the same work
  faults  runs are killed and go on: is the result the same, bit for bit?
  soak    a long run: do memory and file handles stay flat?

`apportion bench NAME --help` explains one and every setting.
"""
EXAMPLES = """examples:
  apportion bench speed                                      # beside TRL's PPO: all weights, a separate value model
  apportion bench speed --ours default --peer_precision bfloat16
  apportion bench speed --peer trl-grpo --json
  apportion bench speed --batch 8 --new_tokens 64 --epochs 2 --batches 10 --output mine.json

Each side runs in processes of its own, in turns. The peer's package is installed once, into the cache folder, and runs
with this environment's torch and transformers. `time_ratio` is the peer's seconds over ours, `memory_ratio` our peak
memory over the peer's: median, and the least and most of any pair of batches or processes. No ratio is given (exit code
2) when prompts, tokens or optimizer steps differ. docs/bench.md says how each figure is made.
"""


def run(arguments: list[str]) -> int:
    """Find the benchmark, run it, and print a table or one JSON object."""
    if not arguments or arguments[0] in ("-h", "--help"):
        sys.stdout.write(HELP)
        return 0
    if arguments[0] in ("faults", "soak"):
        from benchmarks.faults import command

        return (command.run_faults if arguments[0] == "faults" else command.run_soak)(arguments[1:])
    if arguments[0] != "speed":
        raise unknown_name("benchmark", arguments[0], ["speed", "faults", "soak"])
    as_json = "--json" in arguments
    parsed = parse(SpeedConfig, "bench speed", [a for a in arguments[1:] if a != "--json"], EXAMPLES)
    if parsed.fresh:
        raise ConfigError("--fresh", True, "no such switch here", "A result file is always written anew.")
    check(parsed.config)
    if parsed.dry_run:
        sys.stdout.write(show(parsed.config))
        return 0
    from benchmarks.speed import output_of, speed

    found = speed(parsed.config, tell=note)
    if as_json:
        sys.stdout.write(json.dumps(found) + "\n")
    else:
        print_table(found)
        note(str(output_of(parsed.config)))
    return 0


def print_table(found: Mapping[str, Any]) -> None:
    """Print both sides, a row a figure, and the two ratios."""
    ours, peer, settings = found["ours"], found["peer"], found["settings"]
    table = Table("a batch", f"ours ({settings['ours']})", f"{settings['peer']} ({peer['precision']})")
    for title, row in rows(found):
        table.add_row(title, row(ours), row(peer))
    console = Console(markup=False, highlight=False, soft_wrap=True)
    if not console.is_terminal:  # a file is as wide as it has to be
        console.width = 140
    console.print(table)
    for precision, trial in peer["trials"].items():
        console.print(f"{settings['peer']} in {precision}: {trial['seconds']:.2f} s a batch")
    rates, box = found["rates"], found["machine"]
    console.print(
        f"matmul here: {rates['float32_flops'] / 1e9:.0f} GFLOP/s in float32, {rates['bfloat16_flops'] / 1e9:.0f} in "
        f"bfloat16; reading {rates['read_bytes'] / 1e9:.1f} GB/s ({box['cpu']}, {box['threads']} threads)"
    )
    console.print(f"time_ratio (peer over ours): {written(found['time_ratio'])}")
    console.print(f"memory_ratio (ours over peer): {written(found['memory_ratio'])}")
    if not found["enough"]:
        console.print(f"Fewer than {ENOUGH} timed batches: the medians say little.")


def rows(found: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Return (title, side -> text) of every row of the table."""
    work = [(name.replace("_", " "), lambda s, n=name: f"{s['work'][n] / s['batches']:,.0f}") for name in WORK]
    phases = [(f"{name}, s", lambda s, n=name: f"{s['phases'][n]['median']:.2f}") for name in found["phases"]]
    return [
        *work,
        *phases,
        ("total, s [min, max]", lambda s: written(s["seconds"])),
        ("generated tokens/s", lambda s: f"{s['tokens_per_s']['generated_in_generate']:,.0f}"),
        ("trained tokens/s of the update", lambda s: f"{s['tokens_per_s']['trained_in_update']:,.0f}"),
        ("operations, GFLOP", lambda s: f"{s['flop']['total'] / 1e9:,.1f}"),
        ("GFLOP/s, all", lambda s: rate(s["flops"]["total"])),
        ("GFLOP/s, update", lambda s: rate(s["flops"]["update"])),
        ("peak memory, MB", lambda s: f"{s['memory_mb']['median']:,.0f}"),
        ("weights changed by a step", lambda s: f"{s['weights_changed']:.1%}"),
    ]


WORK = ("prompts", "prompt_tokens", "generated_tokens", "trained_tokens", "optimizer_steps")


def rate(found: Mapping[str, float]) -> str:
    """Return a rate with its shares of the matmul rates."""
    return f"{found['flops'] / 1e9:,.0f} ({found['of_bfloat16']:.0%} of bfloat16, {found['of_float32']:.0%} of float32)"


def written(value: Mapping[str, float]) -> str:
    """Return "median [min, max]"."""
    return f"{value['median']:.2f} [{value['min']:.2f}, {value['max']:.2f}]"
