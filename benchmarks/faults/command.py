"""`apportion bench faults` and `apportion bench soak`: parse, run under a bar, print what came of it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from apportion.cli.arguments import Parsed, parse, show
from apportion.cli.terminal import bar, note
from apportion.errors import ConfigError
from apportion.training.run_folder import explain_disk_errors
from benchmarks.faults.settings import FaultsConfig, SoakConfig, check_faults, check_soak

FAULTS = """examples:
  apportion bench faults                          # 50 kills, 3 of them on the whole model: some 20 minutes on two cores
  apportion bench faults --kills 12 --model_kills 0 --json
  apportion bench faults --kills 200 --seed 1 --out faults.json

Each run is killed (SIGKILL), given the same command again, and compared with a run that was left alone: SHA-256 of the
final weights, and every row of the logs but time/* and memory/*. Exit code 1 where one differs. docs/resume.md.
"""
SOAK = """examples:
  apportion bench soak
  apportion bench soak --batches 10000 --out soak.json
"""
GROWTH = 0.02  # of memory after the warm-up


def run_faults(arguments: list[str]) -> int:
    """Kill runs; return 0 where each ended as if it had not been killed, else 1."""
    as_json, parsed = _parsed(FaultsConfig, "bench faults", arguments, FAULTS)
    check_faults(parsed.config)
    if parsed.dry_run:
        sys.stdout.write(show(parsed.config))
        return 0
    from benchmarks.faults.harness import faults

    with bar("faults", parsed.config.kills, {}) as progress:
        found = faults(parsed.config, lambda done, line: progress.line(done, line))
    _written(found, parsed.config.out, as_json)
    if not as_json:
        for name in (k for k, v in found.items() if not isinstance(v, (dict, list))):
            sys.stdout.write(f"{name:<24}{found[name]}\n")
    if not found["enough"]:
        note("not enough: fewer than a fifth of the kills hit a checkpoint, or fewer than half had one to go on from.")
    same = found["bit_identical"] == found["kills"]
    return int(not (same and found["log_rows_lost"] == found["log_rows_doubled"] == 0))


def run_soak(arguments: list[str]) -> int:
    """Run long; return 0 where memory and handles stayed flat, else 1."""
    as_json, parsed = _parsed(SoakConfig, "bench soak", arguments, SOAK)
    check_soak(parsed.config)
    if parsed.dry_run:
        sys.stdout.write(show(parsed.config))
        return 0
    from benchmarks.faults.soak import soak

    with bar("soak", parsed.config.batches, {}) as progress:
        found = soak(parsed.config, lambda done, line: progress.line(done, line))
    _written(found, parsed.config.out, as_json)
    if not as_json:
        memory, handles = found["memory_mb"], found["handles"]
        sys.stdout.write(
            f"{found['batches']} batches in {found['seconds']:.0f} s, judged after {found['judge_after']}\n"
            f"memory   {memory['first']:.1f} to {memory['last']:.1f} MB: {found['memory_growth']:+.2%}, "
            f"{found['memory_slope_mb_per_1000']:+.3f} MB per 1000 batches\n"
            f"handles  {handles['median_first_half']:g} in the first half, {handles['median_second_half']:g} in the "
            f"second ({handles['least']} to {handles['most']})\n"
        )
    flat = found["handles"]["median_second_half"] <= found["handles"]["median_first_half"]
    return int(not (found["memory_growth"] < GROWTH and flat))


def _parsed(kind: type, name: str, arguments: list[str], examples: str) -> tuple[bool, Parsed]:
    parsed = parse(kind, name, [a for a in arguments if a != "--json"], examples)
    if parsed.fresh:
        raise ConfigError("--fresh", True, "no such switch here", "A result file is always written anew.")
    return "--json" in arguments, parsed


def _written(found: dict[str, Any], out: str | None, as_json: bool) -> None:
    text = json.dumps(found, indent=2) + "\n"
    if out is not None:
        path = Path(out).expanduser()
        with explain_disk_errors(path):
            path.write_text(text, encoding="utf-8")
    if as_json:
        sys.stdout.write(text)
