"""Writes the tables of docs/models.md: every family of the installed transformers, tiny and random, with its results.

python -m tools.family_table                  # sweep all families and write both tables (some minutes)
python -m tools.family_table llama bert       # sweep these again, and keep the other rows
python -m tools.family_table --check          # exit 1 and name the families that the tables lack or have too many
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "tests" / "support"))  # the sweep is a test as well

PAGE = ROOT / "docs" / "models.md"
TASKS = ("classifier", "causal")
HEADERS = {
    "classifier": ("family", "score", "read at", "attention", "saved"),
    "causal": ("family", "sampled from", "sampled and recomputed", "adapters", "saved"),
}
Table = dict[str, tuple[str, ...]]


def main() -> int:
    """Write or check the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("families", nargs="*", help="only these")
    parser.add_argument("--check", action="store_true", help="only compare the families")
    options = parser.parse_args()
    page = PAGE.read_text(encoding="utf-8")
    if options.check:
        wrong = [f"{task}: {name}" for task in TASKS for name in sorted({*expected(task)} ^ {*read(page, task)})]
        print("\n".join(wrong) or "the tables have every family")
        return int(bool(wrong))
    for task in TASKS:
        kept = {name: row for name, row in read(page, task).items() if name in expected(task)}
        again = set(options.families) if options.families else set(expected(task))
        table = kept | swept(task, sorted(again & set(expected(task))))
        page = replaced(page, task, table)
        PAGE.write_text(page, encoding="utf-8")
    return 0


def expected(task: str) -> list[str]:
    """Return the names of the installed transformers' families of `task`."""
    import family_configs

    return family_configs.families(task)


def swept(task: str, names: Iterable[str]) -> Table:
    """Return a row for each of `names`; one that is neither right nor refused says so in capitals."""
    import family_sweep

    rows: Table = {}
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            try:
                rows[name] = tuple(family_sweep.swept(task, name, Path(folder))[1:])
            except Exception as error:  # the others still run
                rows[name] = (f"WRONG: {type(error).__name__}: {str(error)[:100]}", "", "", "")
        print(task, name, *rows[name], sep=" | ", flush=True)
    return rows


def read(page: str, task: str) -> Table:
    """Return the rows of a table of the page, by family."""
    lines = _between(page, task).splitlines()
    rows = [tuple(cell.strip() for cell in line.strip().split("|")[1:-1]) for line in lines if "|" in line]
    return {row[0]: row[1:] for row in rows[2:]}


def replaced(page: str, task: str, table: Mapping[str, tuple[str, ...]]) -> str:
    """Return the page with this table in the place of its own."""
    head = HEADERS[task]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += ["| " + " | ".join((name, *row)).strip() + " |" for name, row in sorted(table.items())]
    found = _mark(task).search(page)
    if found is None:
        raise SystemExit(f"{PAGE}: no marks of the table {task}")
    return page[: found.start(1)] + "\n" + "\n".join(lines) + "\n\n" + page[found.end(1) :]


def _between(page: str, task: str) -> str:
    """Return the text between the two marks of a table."""
    found = _mark(task).search(page)
    return "" if found is None else found[1]


def _mark(task: str) -> re.Pattern[str]:
    return re.compile(rf"<!-- {task} -->\n(.*?)<!-- end of {task} -->", re.DOTALL)


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    sys.exit(main())
