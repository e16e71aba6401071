"""Prompts to sample from: the built-in IMDb reviews, or a table with a column prompt, messages or text."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from apportion.data import splits
from apportion.data.assets import BUILTIN_DATA
from apportion.data.bad_rows import BadRows
from apportion.data.formats import Row
from apportion.data.reviews import labelled
from apportion.data.tables import check_text, require, usable
from apportion.errors import DataError

Messages = list[dict[str, Any]]  # each with role and content, both str

_COLUMNS = ("prompt", "messages", "text")  # the first that a table has is used
_SHORTEST = 200  # characters; a shorter review is too short to continue


def prompts(
    source: str, part: str | None = None, *, field: str = "prompts", bad: BadRows | None = None
) -> list[str | Messages]:
    """Read prompts.

    Args:
        source: "imdb" (the reviews of more than 200 characters, shuffled by a hash of their text), or anything that
            `read_rows` takes, with a column prompt, messages or text, in the order of the file. A prompt is text, or
            a list of {"role", "content"} to which the caller applies the chat template.
        part: one of `splits.PARTS`, or None for every row.
        field: the configuration key that gave `source`, for error messages.
        bad: the log of invalid rows of a table; None makes the first of them an error.

    Raises:
        DataError: the errors of `read_rows`, an empty prompt, a message without role or content, a part without rows.
        ConfigError: an unknown part.
    """
    if part is not None:
        splits.bounds(part)
    if source in BUILTIN_DATA:
        texts = [row.text for row in labelled(source, part, field=field) if len(row.text) > _SHORTEST]
        return [*sorted(texts, key=_shuffled)]
    rows = _table(source, field, bad)
    if part is None:
        return rows
    chosen = splits.part(rows, part, text=_key)
    if not chosen:
        got = f"{source}: no prompt of {len(rows)} falls into part {part!r}"
        raise DataError(field, got, "at least one prompt", "Give more rows, or no part.")
    return chosen


def _table(source: str, field: str, bad: BadRows | None) -> list[str | Messages]:
    column = ""  # of the first row that has one; a row without any lacks the first

    def row_of(row: Row) -> str | Messages:
        nonlocal column
        column = column or next((name for name in _COLUMNS if name in row), "")
        return _prompt(row, column or _COLUMNS[0], field)

    return list(usable(source, row_of, field=field, bad=bad))


def _prompt(row: Row, column: str, field: str) -> str | Messages:
    require(row, column, field=field)
    value = row[column]
    if not isinstance(value, list) and column != "messages":
        return check_text(row, column, field=field)
    if not isinstance(value, list) or not value:
        got = f"{row.where}: {column} = {value!r:.60}"
        fix = 'Write [{"role": "user", "content": "..."}].'
        raise DataError(field, got, "a list of messages", fix)
    return [_message(item, i, row, column, field) for i, item in enumerate(value)]


def _message(item: Any, index: int, row: Row, column: str, field: str) -> dict[str, Any]:
    where = f"{row.where}: {column}[{index}]"
    if not isinstance(item, dict):
        fix = 'Write {"role": "user", "content": "..."}.'
        raise DataError(field, f"{where} = {item!r:.60}", "an object with role and content", fix)
    inner = Row(item, where)
    for key in ("role", "content"):
        check_text(inner, key, field=field)
    return dict(item)  # other keys, such as a name, are for the chat template


def _key(prompt: str | Messages) -> str:
    return prompt if isinstance(prompt, str) else json.dumps(prompt, sort_keys=True, ensure_ascii=False)


def _shuffled(text: str) -> bytes:
    # a different hash than `bucket`, whose order inside a part would follow the bucket
    return hashlib.sha256(b"order:" + text.encode()).digest()
