"""Rows of an export, checked and completed: dense ranks, ids, and the source's name."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from apportion.config import LabelImportConfig
from apportion.data import BadRows, Row, usable
from apportion.data.answers.item_id import item_id
from apportion.errors import DataError
from apportion.label.importing.argilla import argilla
from apportion.label.importing.label_studio import label_studio
from apportion.label.items import completions_of, prompt_of

FIELD = "source"
READERS = {"label_studio": label_studio, "argilla": argilla}
NAMES = {"label_studio": "Label Studio", "argilla": "Argilla"}


def import_rankings(config: LabelImportConfig, bad: BadRows | None = None) -> Iterator[dict[str, Any]]:
    """Yield the K-wise rankings of an export: prompt, completions, ranks, item, annotator, seconds, source.

    Raises:
        DataError: a file that cannot be read, a row that is not of the format, an export without rankings, two
            different rankings of an item by one person.
    """
    number = 0
    seen: dict[tuple[str, str | None], list[int | None]] = {}

    def rankings_of(row: Row) -> list[dict[str, Any]]:
        tool = config.format
        if tool == "auto":
            tool = "label_studio" if "annotations" in row else "argilla"
        given = READERS[tool](row, config.prompt, config.completions, config.question)
        found = [_complete(one, row, NAMES[tool]) for one in given]
        return [one for one in found if _is_first(one, seen, row)]

    for found in usable(config.source, rankings_of, field=FIELD, bad=bad):
        number += len(found)
        yield from found
    if not number:
        fix = "Check --format, and --question where the project has several."
        raise DataError(FIELD, f"{config.source}: no rankings", "at least one ranking", fix)


def _is_first(one: dict[str, Any], seen: dict[tuple[str, str | None], list[int | None]], row: Row) -> bool:
    """Whether a ranking is no copy of one of `seen`, a task that was exported twice. Raises DataError for another."""
    before = seen.setdefault((one["item"], one["annotator"]), one["ranks"])
    if before is one["ranks"] or one["annotator"] is None:
        return True
    if before == one["ranks"]:
        return False
    got = f"{row.where}: a second ranking of item {one['item'][:12]}… by {one['annotator']!r:.40}, with other ranks"
    fix = "Remove one of them in the tool and export again, or leave the second out with --skip_bad_rows."
    raise DataError(FIELD, got, "one ranking of an item by a person", fix)


def _complete(one: dict[str, Any], row: Row, source: str) -> dict[str, Any]:
    """Return a ranking with dense ranks, its id and its source. Raises DataError."""
    cells = Row({"prompt": one["prompt"], "completions": one["completions"]}, row.where)
    prompt, completions = prompt_of(cells, FIELD), completions_of(cells, FIELD)
    ranks = dense(one["ranks"], row)
    seconds = one["seconds"]
    return {
        "prompt": prompt,
        "completions": completions,
        "ranks": ranks,
        "item": item_id(prompt, completions),
        "annotator": one["annotator"],
        "seconds": float(seconds) if isinstance(seconds, (int, float)) else None,
        "source": source,
    }


def dense(ranks: list[Any], row: Row) -> list[int | None]:
    """Return ranks (K,) without gaps, 1 is best; None stays. Raises DataError where fewer than two are numbers."""
    if any(rank is not None and (isinstance(rank, bool) or not isinstance(rank, int)) for rank in ranks):
        raise DataError(FIELD, f"{row.where}: ranks {ranks!r:.60}", "whole numbers", "Export the ranks as numbers.")
    if sum(rank is not None for rank in ranks) < 2:
        fix = "Leave such rows out with --skip_bad_rows, or finish them in the tool."
        raise DataError(FIELD, f"{row.where}: ranks {ranks!r:.60}", "at least two answers with a rank", fix)
    places = {rank: i for i, rank in enumerate(sorted({rank for rank in ranks if rank is not None}), 1)}
    return [None if rank is None else places[rank] for rank in ranks]
