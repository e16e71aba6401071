"""Checks that the tests run every line of floors 0 and 1: reads a coverage JSON, prints the missing lines."""

from __future__ import annotations

import argparse
import json
import sys
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PREFIX = "src/apportion/"
COVERED = 2  # of the floors, from the lowest


def floors(pyproject: Path = ROOT / "pyproject.toml") -> list[list[str]]:
    """Return the names of each floor's modules and packages, floor 0 first, from import-linter's contract "floors"."""
    contracts = tomllib.loads(pyproject.read_text(encoding="utf-8"))["tool"]["importlinter"]["contracts"]
    layers = next(contract["layers"] for contract in contracts if contract.get("id") == "floors")
    return [[name.strip() for name in layer.replace("|", ":").split(":")] for layer in reversed(layers)]


def belongs(path: str, module: str) -> bool:
    """Return whether a file of the package is `module`, such as "credit" or "credit.attention", or lies in it."""
    inside = path.rpartition(PREFIX)[2]
    name = module.replace(".", "/")
    return PREFIX in path and (inside == f"{name}.py" or inside.startswith(f"{name}/"))


def ranges(lines: Iterable[int]) -> str:
    """Return line numbers as "3-5, 9"."""
    parts: list[list[int]] = []
    for line in sorted(lines):
        if parts and line == parts[-1][1] + 1:
            parts[-1][1] = line
        else:
            parts.append([line, line])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)


def check(report: Mapping[str, Any], modules: Mapping[str, list[str]]) -> tuple[list[str], bool]:
    """Return the lines to print, and whether every line of every module was run.

    A module that is not in the report is a failure: it was never imported, or renamed without its entry in the list.
    """
    files: Mapping[str, Any] = {path.replace("\\", "/"): found for path, found in report["files"].items()}
    out, good = [], True
    for floor, names in modules.items():
        run = total = 0
        wrong = [
            f"  {name}: no such module in the report" for name in names if not any(belongs(p, name) for p in files)
        ]
        for path, found in sorted(files.items()):
            if any(belongs(path, name) for name in names):
                run += found["summary"]["covered_lines"]
                total += found["summary"]["num_statements"]
                if found["missing_lines"]:
                    wrong.append(f"  {path}: {ranges(found['missing_lines'])}")
        out += [f"{floor}: {run} of {total} lines run" + (f" ({run / total:.1%})" if total else ""), *wrong]
        good &= not wrong
    return out, good


def main() -> int:
    """Print each floor's coverage and missing lines; return 1 when a line is missing."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("report", type=Path, help="the output of `coverage json`")
    parser.add_argument("--pyproject", type=Path, default=ROOT / "pyproject.toml", help="where the floors are listed")
    options = parser.parse_args()
    by_name = {f"floor {number}": names for number, names in enumerate(floors(options.pyproject)[:COVERED])}
    lines, good = check(json.loads(options.report.read_text(encoding="utf-8")), by_name)
    print("\n".join(lines))
    return int(not good)


if __name__ == "__main__":
    sys.exit(main())
