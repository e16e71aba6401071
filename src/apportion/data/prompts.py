"""Prompts to sample from: the built-in IMDb reviews, or a table with prompts, conversations, texts or pairs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from apportion.data import splits
from apportion.data.assets import BUILTIN_DATA
from apportion.data.bad_rows import BadRows
from apportion.data.conversations import Conversation, conversation, from_cell
from apportion.data.formats import Row
from apportion.data.reviews import labelled
from apportion.data.tables import check_text, require, usable
from apportion.errors import DataError

Messages = list[dict[str, Any]]  # turns, each with role and content

_COLUMNS = ("prompt", "messages", "text")  # the first that a table has is used
_PAIR = ("chosen", "rejected")  # without any of these: the prompt is what the two begin with
_SHORTEST = 200  # characters; a shorter review is too short to continue


@dataclass(frozen=True)
class Prompt:
    """A prompt of a table.

    Attributes:
        content: a text, or a conversation to which the chat template is applied.
        where: its file and line, "" for the built-in set. columns: other values of its row, by column.
    """

    content: str | Conversation
    where: str = ""
    columns: Mapping[str, Any] = field(default_factory=dict)


def prompts(
    source: str, part: str | None = None, *, field: str = "prompts", bad: BadRows | None = None
) -> list[str | Messages]:
    """Return the contents of `read_prompts`: texts, and conversations as lists of {role, content}."""
    return [prompt.content for prompt in read_prompts(source, part, field=field, bad=bad)]


def read_prompts(
    source: str,
    part: str | None = None,
    *,
    field: str = "prompts",
    bad: BadRows | None = None,
    columns: Collection[str] | None = (),
    split: str | None = None,
) -> list[Prompt]:
    """Read prompts.

    Args:
        source: "imdb" (the reviews of more than 200 characters, shuffled by a hash of their text), or anything that
            `read_rows` takes, with a column prompt, messages or text, or with pairs (chosen, rejected), whose common
            beginning is the prompt; in the order of the file. A prompt is text, or a list of {"role", "content"}, in
            CSV as JSON, to which the caller applies the chat template.
        part: one of `splits.PARTS`, or None for every row.
        field: the configuration key that gave `source`, for error messages.
        bad: the log of invalid rows of a table; None makes the first of them an error.
        columns: names of the columns to keep beside each prompt; None keeps all.
        split: of a folder or a hub dataset, as `read_rows` takes it.

    Raises:
        DataError: the errors of `read_rows` and `conversation`, an empty prompt, a part without rows, a split of the
            built-in set.
        ConfigError: an unknown part.
    """
    if part is not None:
        splits.bounds(part)
    if source in BUILTIN_DATA:
        if split is not None:
            raise DataError(field, f"{source} with split {split!r}", "data with splits", "Leave the split out.")
        texts = [row.text for row in labelled(source, part, field=field) if len(row.text) > _SHORTEST]
        return [Prompt(text) for text in sorted(texts, key=_shuffled)]
    rows = _table(source, field, bad, columns, split)
    if part is None:
        return rows
    chosen = splits.part(rows, part, text=_key)
    if not chosen:
        got = f"{source}: no prompt of {len(rows)} falls into part {part!r}"
        raise DataError(field, got, "at least one prompt", "Give more rows, or no part.")
    return chosen


def _table(
    source: str, field: str, bad: BadRows | None, columns: Collection[str] | None, split: str | None
) -> list[Prompt]:
    column = ""  # of the first row that has one; a row without any lacks the first

    def row_of(row: Row) -> Prompt:
        nonlocal column
        column = column or next((name for name in _COLUMNS if name in row), "")
        paired = not column and all(name in row for name in _PAIR)
        content = _implicit(row, field) if paired else _content(row, column or _COLUMNS[0], field)
        others = {name: row[name] for name in row if columns is None or name in columns}
        return Prompt(content, row.where, others)

    return list(usable(source, row_of, field=field, bad=bad, split=split))


def _content(row: Row, column: str, field: str) -> str | Conversation:
    require(row, column, field=field)
    value = from_cell(row, column, field)
    if not isinstance(value, list) and column != "messages":
        return check_text(row, column, field=field)
    if not isinstance(value, list) or not value:
        got = f"{row.where}: {column} = {value!r:.60}"
        fix = 'Write [{"role": "user", "content": "..."}].'
        raise DataError(field, got, "a list of messages", fix)
    return conversation([(column, value)], row, field)


def _implicit(row: Row, field: str) -> str | Conversation:
    """Return the prompt of a pair that has none of its own: what chosen and rejected begin with."""
    for name in _PAIR:
        require(row, name, field=field)
    chosen, rejected = (from_cell(row, name, field) for name in _PAIR)
    if isinstance(chosen, list) and isinstance(rejected, list):
        turns = common_beginning(chosen, rejected)
        if turns:
            return conversation([(_PAIR[0], turns)], row, field)
    else:
        text: str = common_beginning(*(check_text(row, name, field=field) for name in _PAIR))
        if text.strip():
            return text
    got = f"{row.where}: chosen = {chosen!r:.40}, rejected = {rejected!r:.40}"
    fix = "Give the prompts in a column 'prompt' of their own."
    raise DataError(field, got, "a pair with a common beginning, which is its prompt", fix)


def common_beginning(one: Any, two: Any) -> Any:
    """Return the longest common beginning of two texts or two lists that leaves something of both.

    A text's does not end with a space: tokens of words begin with theirs.
    """
    least = min(len(one), len(two))
    end = next((i for i in range(least) if one[i] != two[i]), max(least - 1, 0))
    if isinstance(one, str) and end < least and one[:end].endswith(" ") and one[end] != two[end]:
        end -= 1
    return one[:end]


def _key(prompt: Prompt) -> str:
    content: str | Sequence[Any] = prompt.content
    return content if isinstance(content, str) else json.dumps(content, sort_keys=True, ensure_ascii=False)


def _shuffled(text: str) -> bytes:
    # a different hash than `bucket`, whose order inside a part would follow the bucket
    return hashlib.sha256(b"order:" + text.encode()).digest()
