"""Checks that the tests run every line of the lower floors: reads a coverage JSON, prints the missing lines."""

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


def floors(pyproject: Path) -> dict[str, list[str]]:
    """Return {floor: names of its modules and packages}, from [tool.apportion.floors]."""
    return dict(tomllib.loads(pyproject.read_text(encoding="utf-8"))["tool"]["apportion"]["floors"])


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

    A module that the report does not name is a failure: it was never imported, or it was renamed and the list was not.
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
    parser.add_argument("report", type=Path, help="what `coverage json` wrote")
    parser.add_argument("--pyproject", type=Path, default=ROOT / "pyproject.toml", help="where the floors are listed")
    given = parser.parse_args()
    lines, good = check(json.loads(given.report.read_text(encoding="utf-8")), floors(given.pyproject))
    print("\n".join(lines))
    return int(not good)


if __name__ == "__main__":
    sys.exit(main())
