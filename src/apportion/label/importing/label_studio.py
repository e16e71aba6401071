"""Tasks that Label Studio exports as JSON, with a Ranker or a Pairwise tag."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from apportion.data import Row
from apportion.errors import DataError

FIELD = "source"
KINDS = ("ranker", "pairwise")
UNSORTED = "_"  # the internal bucket of what was not moved out of the list


def label_studio(
    row: Row, prompt: str, completions: Sequence[str] | None, question: str | None
) -> Iterator[dict[str, Any]]:
    """Yield the K-wise rankings of one task, one a person.

    A ranker's value is {"ranker": {tag: [ids, best first]}} over a list of {id, title, body} (of {id, html} the html);
    with buckets, what is in them is ranked bucket after bucket, and the rest could not be judged. A pairwise value is
    {"selected": "left"}. Annotations that were cancelled give nothing.

    Raises:
        DataError: no data, no annotations, no or several rankings, an id that is not in the list.
    """
    data = row.get("data")
    if not isinstance(data, Mapping) or prompt not in data:
        keys = list(data) if isinstance(data, Mapping) else list(row)
        got = f"{row.where}: keys {', '.join(map(str, keys))[:200]}"
        fix = "Name the key of the prompt with --prompt; export the project as JSON, not as JSON-MIN or CSV."
        raise DataError(FIELD, got, f"a task whose data has {prompt!r}", fix)
    annotations = row.get("annotations", row.get("completions"))
    if not isinstance(annotations, list):
        raise DataError(FIELD, f"{row.where}: no annotations", "a list of annotations", "Export the project as JSON.")
    for annotation in annotations:
        results = [] if annotation.get("was_cancelled") else annotation.get("result") or []
        found = [r for r in results if r.get("type") in KINDS and question in (None, r.get("from_name"))]
        if not found:
            continue
        if len(found) > 1:
            names = ", ".join(sorted({str(one.get("from_name")) for one in found}))
            got = f"{row.where}: rankings of {names}"
            raise DataError(FIELD, got, "one ranking a person and task", "Name the tag with --question.")
        texts, ranks = _ranking(found[0], data, completions, row)
        yield {
            "prompt": data[prompt],
            "completions": texts,
            "ranks": ranks,
            "annotator": _person(annotation.get("completed_by")),
            "seconds": annotation.get("lead_time"),
        }


def _ranking(
    result: Mapping[str, Any], data: Mapping[str, Any], completions: Sequence[str] | None, row: Row
) -> tuple[list[Any], list[int | None]]:
    value = result.get("value") or {}
    if result["type"] == "pairwise":
        keys = list(completions or _pair_keys(data))
        if len(keys) != 2 or any(key not in data for key in keys):
            got = f"{row.where}: keys {', '.join(map(str, data))[:200]}"
            raise DataError(
                FIELD, got, "two answers to compare", "Name their keys: --completions '[answer1, answer2]'."
            )
        left, right = (1, 2) if value.get("selected") == "left" else (2, 1)
        ranks: list[int | None] = [left, right] if value.get("selected") in ("left", "right") else [1, 1]
        return [data[key] for key in keys], ranks
    if completions is not None:
        entries = {key: data.get(key) for key in completions}
    else:
        entries = _listed(data, value.get("ranker"), row)
    order = _order(value.get("ranker"), result.get("from_name"))
    unknown = [one for one in order if one not in entries]
    if unknown:
        fix = "Export tasks and annotations together; the list must be the one that was ranked."
        raise DataError(FIELD, f"{row.where}: id {unknown[0]!r:.60}", "an id of the list that was ranked", fix)
    place = {one: i for i, one in enumerate(order, 1)}
    return list(entries.values()), [place.get(key) for key in entries]


def _order(ranker: Any, tag: Any) -> list[str]:
    """Return the ids that were ranked, best first: a plain list, one under the tag's name, or bucket after bucket."""
    if isinstance(ranker, list):
        return [str(one) for one in ranker]
    if not isinstance(ranker, Mapping):
        return []
    sorted_ones = [ids for name, ids in ranker.items() if name != UNSORTED]
    chosen = [ranker[tag]] if tag in ranker else sorted_ones or [ranker.get(UNSORTED, [])]
    return [str(one) for ids in chosen for one in ids]


def _listed(data: Mapping[str, Any], ranker: Any, row: Row) -> dict[str, Any]:
    """Return {id: text} of the list in a task's data."""
    for value in data.values():
        if isinstance(value, list) and value and all(isinstance(one, Mapping) and "id" in one for one in value):
            return {str(one["id"]): one.get("body", one.get("html", one.get("title", ""))) for one in value}
    got = f"{row.where}: keys {', '.join(map(str, data))[:200]}"
    raise DataError(FIELD, got, "a list of {id, body}", "Name the answers' keys with --completions.")


def _pair_keys(data: Mapping[str, Any]) -> list[str]:
    return [key for key in data if re.fullmatch(r"(text|answer|response|completion)_?[12ab]", str(key), re.IGNORECASE)]


def _person(value: Any) -> str | None:
    """Return who annotated: an id, or an object with an email or an id."""
    if isinstance(value, Mapping):
        value = value.get("email", value.get("id"))
    return None if value is None else str(value)
