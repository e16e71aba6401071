"""`apportion report`: draw run folders on one page that works offline."""

from __future__ import annotations

import sys
from pathlib import Path

from apportion.errors import ConfigError, unknown_name
from apportion.system.paths import local_path

HELP = """usage: apportion report RUN [RUN ...] [--output PAGE.html]

Draw the learning curves of all runs given, samples before and after, and token heat maps of credit on one
self-contained HTML page that works offline.

  RUN       a run folder of `apportion reward` or `apportion rl`
            or, alone, the folder of a comparison by `apportion evaluate --policies`
  --output  the page to write (default: report.html in the first run folder; evaluation.html of a comparison)

example:
  apportion report runs/abc runs/uniform runs/sparse --output compare.html
"""


def run(arguments: list[str]) -> int:
    """Write the page and print its path."""
    if "-h" in arguments or "--help" in arguments:
        sys.stdout.write(HELP)
        return 0
    runs, output = _parse(arguments)
    from apportion.report.comparison.page import write_comparison
    from apportion.report.comparison.read import is_comparison
    from apportion.report.page import write_report

    if len(runs) == 1 and is_comparison(runs[0]):
        sys.stdout.write(f"{write_comparison(runs[0], output)}\n")
        return 0
    sys.stdout.write(f"{write_report(runs, output or runs[0] / 'report.html')}\n")
    return 0


def _parse(arguments: list[str]) -> tuple[list[Path], Path | None]:
    rest, runs, output = list(arguments), [], None
    while rest:
        word = rest.pop(0)
        name, equals, value = word.partition("=")
        if name == "--output":
            if not equals and not rest:
                raise ConfigError("--output", "nothing", "a file name", "Write --output page.html.")
            output = local_path(value if equals else rest.pop(0), "--output", ConfigError)
        elif word.startswith("-"):
            raise unknown_name("flag", word, ["--output", "--help"])
        else:
            runs.append(local_path(word, "RUN", ConfigError))
    if not runs:
        fix = "Name one, for example `apportion report runs/rl`."
        raise ConfigError("RUN", "nothing", "at least one run folder", fix)
    return runs, output
