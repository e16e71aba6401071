"""Reader of the folder of a comparison."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apportion.errors import DataError
from apportion.report.style import finite
from apportion.system.paths import link_outside

FIX = "Run `apportion evaluate --policies …` again with the same --output; where it was finished, with --fresh."


@dataclass(frozen=True)
class Comparison:
    """A comparison as it was written.

    Attributes:
        path: the folder. name: of the folder. figures: evaluation.json. samples: a row a prompt.
        credit: rows of token credit by (prompt, policy). settings: the text of config.yaml.
    """

    path: Path
    name: str
    figures: Mapping[str, Any]
    samples: tuple[Mapping[str, Any], ...]
    credit: Mapping[tuple[int, str], Mapping[str, Any]]
    settings: str

    @property
    def everyone(self) -> list[str]:
        """The start, then the policies: number i has colour i everywhere."""
        return [str(self.figures["start"]), *map(str, self.figures["policies"])]

    @property
    def main(self) -> str:
        """The measure that plots and samples are ordered by: the first judge, or the reward."""
        measures = [str(key) for key in self.figures["measures"]]
        return next((key for key in measures if key.startswith("judge/")), measures[0])

    def of(self, name: str) -> Mapping[str, Any]:
        """Return the figures of one policy."""
        found: Mapping[str, Any] = self.figures["figures"][name]
        return found


def is_comparison(path: Path) -> bool:
    """Whether the folder is that of a finished comparison."""
    try:
        found = json.loads((path / "evaluation.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(found, dict) and found.get("kind") == "comparison"


def read_comparison(path: Path) -> Comparison:
    """Return the comparison in the folder `path`.

    Raises:
        DataError: a file is absent or damaged, or a link leads out of the folder.
    """
    if link := link_outside(path):
        fix = "Remove it; the folder itself may be a link."
        raise DataError("run", f"{link}, a link to {os.readlink(link)}", "a folder without links to outside", fix)
    try:
        figures = json.loads((path / "evaluation.json").read_text(encoding="utf-8"))
        samples = tuple(_lines(path / "samples.jsonl"))
        rows = _lines(path / "credit.jsonl") if (path / "credit.jsonl").is_file() else []
        credit = {(int(row["prompt"]), str(row["policy"])): row for row in rows}
        settings = (path / "config.yaml").read_text(encoding="utf-8")
        made = Comparison(path, path.resolve().name, figures, samples, credit, settings)
        _check(made)
    except (OSError, ValueError, KeyError, TypeError, IndexError, RecursionError) as error:
        got = f"{path} ({type(error).__name__}: {str(error)[:200]})"
        raise DataError("run", got, "the folder of a finished comparison of policies", FIX) from error
    return made


def _check(made: Comparison) -> None:
    for name in made.everyone:
        if not isinstance(made.of(name)["measures"], dict):
            raise ValueError(f"no measures of {name}")
    if made.main not in made.of(made.everyone[0])["measures"] or finite(made.figures["prompts"]) is None:
        raise ValueError("no measure")
    for row in made.samples:
        if not all(isinstance(row["policies"][name]["completions"], list) for name in made.everyone):
            raise ValueError("a sample without completions")


def _lines(path: Path) -> list[dict[str, Any]]:
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]
