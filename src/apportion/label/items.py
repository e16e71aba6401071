"""Items to rank: a prompt and its K answers, from samples or from any table with `prompt` and `completions`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from apportion.data import BadRows, Row, check_text, require, usable
from apportion.data.answers.item_id import canonical_json, item_id
from apportion.data.conversations import conversation, from_cell
from apportion.errors import DataError

FIELD = "data"
MOST = 12  # answers of an item; they are labelled A to L, and more than a dozen texts cannot be compared at once

Text = str | list[dict[str, Any]]  # a text, or the turns of a conversation


@dataclass(frozen=True)
class Item:
    """A prompt and its K answers, in the order of the file.

    Attributes:
        item: its stable id. prompt: a text or messages. completions: K texts, or K lists of messages.
        where: its file and line.
    """

    item: str
    prompt: Text
    completions: list[Text]
    where: str = ""

    @property
    def content(self) -> str:
        """The prompt and the answers as JSON, the same for equal ones."""
        return canonical_json({"prompt": self.prompt, "completions": self.completions})


def read_items(source: str, *, field: str = FIELD, bad: BadRows | None = None, split: str | None = None) -> list[Item]:
    """Return the items of `source`, each once, in the order of the file.

    Args:
        source: anything that `data.read_rows` takes, with columns `prompt` (text or messages) and `completions` (a list
            of texts or of messages; in CSV as JSON); `item`, where it stands, is the id.
        bad: the log of invalid rows; None makes the first of them an error.

    Raises:
        DataError: the errors of `read_rows`; fewer than two or more than `MOST` answers, an id that two
            different items share.
    """
    seen: dict[str, Item] = {}

    def make(row: Row) -> Item:
        made = item_of(row, field)
        first = seen.setdefault(made.item, made)
        if first.content != made.content:
            got = f"{made.where}: item {made.item!r:.40}, which {first.where} has with other texts"
            fix = (
                "Give each prompt and its answers an id of their own, or drop the column: the id is then their SHA-256."
            )
            raise DataError(field, got, "one prompt and one list of answers an id", fix)
        return made

    for _ in usable(source, make, ("prompt", "completions"), field=field, bad=bad, split=split):
        pass
    return list(seen.values())


def item_of(row: Row, field: str = FIELD) -> Item:
    """Return the item in `row`. Raises DataError as `read_items`."""
    prompt = prompt_of(row, field)
    completions = completions_of(row, field)
    given = row.get("item")
    if given is None:
        return Item(item_id(prompt, completions), prompt, completions, row.where)
    name = (
        str(given) if isinstance(given, int) and not isinstance(given, bool) else check_text(row, "item", field=field)
    )
    if len(name) > 128 or not name.isprintable():
        fix = "Shorten it, or drop the column: the id is then the SHA-256 of prompt and completions."
        raise DataError(field, f"{row.where}: item = {name!r:.60}", "an id of at most 128 printable characters", fix)
    return Item(name, prompt, completions, row.where)


def prompt_of(row: Row, field: str) -> Text:
    """Return the prompt of `row`: a text, or the turns of a conversation as plain values."""
    require(row, "prompt", field=field)
    value = from_cell(row, "prompt", field)
    if isinstance(value, list) and value:
        return _plain(conversation([("prompt", value)], row, field))
    return check_text(row, "prompt", field=field)


def completions_of(row: Row, field: str) -> list[Text]:
    """Return the K answers of `row`, each a text or messages."""
    require(row, "completions", field=field)
    value = row["completions"]
    if isinstance(value, str):
        with suppress(ValueError, RecursionError):  # reported below as text
            value = json.loads(value)
    if not isinstance(value, list):
        got = f"{row.where}: completions = {value!r:.60}"
        raise DataError(field, got, "a list of answers", 'Write ["first answer", "second answer"].')
    if not 2 <= len(value) <= MOST:
        got = f"{row.where}: {len(value)} completion{'s' * (len(value) != 1)}"
        fix = "Sample more answers a prompt, or remove the row." if len(value) < 2 else "Split it into several items."
        raise DataError(field, got, f"2 to {MOST} answers to rank", fix)
    return list(_answers(value, row, field))


def _answers(value: list[Any], row: Row, field: str) -> Iterator[Text]:
    for i, one in enumerate(value):
        name = f"completions[{i}]"
        cell = Row({name: one}, row.where)
        if isinstance(one, list) and one:
            yield _plain(conversation([(name, one)], cell, field))
        elif isinstance(one, str) and not one.strip():
            yield one  # a blank answer is one: the model ended at once
        else:
            yield check_text(cell, name, field=field)


def _plain(turns: Any) -> list[dict[str, Any]]:
    return [dict(turn) for turn in turns]
