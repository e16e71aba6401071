"""Records of Argilla, exported by `to_list` or `to_json`, nested or flattened, of version 2 and of version 1."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from apportion.data import Row
from apportion.errors import DataError

FIELD = "source"
SUBMITTED = "submitted"


class Response(NamedTuple):
    """One person's response to a ranking question: {option: rank}, and who gave it."""

    ranks: dict[str, int | None]
    annotator: str | None


def argilla(row: Row, prompt: str, completions: Sequence[str] | None, question: str | None) -> Iterator[dict[str, Any]]:
    """Yield the K-wise rankings of one record, one a person; drafts and discarded responses give nothing.

    Version 2 writes a response's options best first, version 1 writes {"rank", "value"} objects, in which ties are
    equal ranks. An option's text is the field of its name ("response-1" is the field response_1 or response-1).

    Raises:
        DataError: no such prompt, no or several rankings, an option without its field.
    """
    fields = row.get("fields") if isinstance(row.get("fields"), Mapping) else row
    assert fields is not None
    if fields.get(prompt) is None:
        got = f"{row.where}: fields {', '.join(map(str, fields))[:200]}"
        raise DataError(FIELD, got, f"a record with the field {prompt!r}", "Name the prompt's field with --prompt.")
    for response in _responses(row, question):
        names = list(completions or sorted(response.ranks))
        by_name = {_plain(name): rank for name, rank in response.ranks.items()}
        lacking = [name for name in names if _field(fields, name) is None]
        if lacking or len(names) < 2:
            got = f"{row.where}: option {(lacking or names or ['none'])[0]!r:.60}"
            fix = "Name the answers' fields with --completions, in the order of the options."
            raise DataError(FIELD, got, "a field with the text of every option", fix)
        yield {
            "prompt": fields[prompt],
            "completions": [_field(fields, name) for name in names],
            "ranks": [by_name.get(_plain(name)) for name in names],
            "annotator": response.annotator,
            "seconds": None,
        }


def _responses(row: Row, question: str | None) -> Iterator[Response]:
    """Yield the submitted responses to the ranking question, whatever the form of the export."""
    found = {name: list(items) for name, items in _questions(row) if question in (None, name) and items}
    if not found:
        return
    if len(found) > 1:
        got = f"{row.where}: rankings of {', '.join(sorted(found))}"
        raise DataError(FIELD, got, "one ranking question", "Name it with --question.")
    for value, person, status in next(iter(found.values())):
        if status in (None, SUBMITTED):
            yield Response(_ranks(value), None if person is None else str(person))


def _questions(row: Row) -> Iterator[tuple[str, list[tuple[Any, Any, Any]]]]:
    """Yield (question, [(value, person, status)]) of the questions whose values are rankings."""
    nested = row.get("responses")
    if isinstance(nested, Mapping):  # version 2, nested
        for name, given in nested.items():
            items = [(one.get("value"), one.get("user_id"), one.get("status")) for one in given or ()]
            yield name, [item for item in items if _is_ranking(item[0])]
        return
    for name, given in row.items():
        if name.endswith(".responses") and isinstance(given, list):  # version 2, flattened
            people = row.get(f"{name}.users") or [None] * len(given)
            states = row.get(f"{name}.status") or [None] * len(given)
            items = list(zip(given, people, states, strict=True))
            yield name.removesuffix(".responses"), [item for item in items if _is_ranking(item[0])]
        elif isinstance(given, list) and given and all(isinstance(one, Mapping) and "value" in one for one in given):
            items = [(one["value"], one.get("user_id"), one.get("status")) for one in given]  # version 1
            yield name, [item for item in items if _is_ranking(item[0])]


def _is_ranking(value: Any) -> bool:
    if isinstance(value, Mapping):
        return isinstance(value.get("value"), list) and isinstance(value.get("rank"), list)
    if not isinstance(value, list) or len(value) < 2:
        return False
    return all(isinstance(one, str) or (isinstance(one, Mapping) and "value" in one) for one in value)


def _ranks(value: Any) -> dict[str, int | None]:
    """Return {option: rank} of a response's value."""
    if isinstance(value, Mapping):  # version 1 as a table: two lists
        return dict(zip(value["value"], value["rank"], strict=True))
    if all(isinstance(one, str) for one in value):
        return {one: i for i, one in enumerate(value, 1)}
    return {one["value"]: one.get("rank", i) for i, one in enumerate(value, 1)}


def _plain(name: str) -> str:
    return name.replace("-", "_").lower()


def _field(fields: Mapping[str, Any], name: str) -> Any:
    """Return the field of an option, with either kind of dash in its name."""
    return next((value for key, value in fields.items() if _plain(str(key)) == _plain(name)), None)
