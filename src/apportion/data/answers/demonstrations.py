"""Demonstrations in rows of a table: a text, a prompt with its completion, or a conversation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from apportion.data.assets import BUILTIN_DATA
from apportion.data.conversations import Conversation, conversation, from_cell
from apportion.data.formats import Row
from apportion.data.formats.rows import listed
from apportion.data.label_rows import FORMS, NAMED, column_hint, is_conversation
from apportion.data.reviews import labelled
from apportion.data.tables import check_text, require
from apportion.errors import DataError

ASSISTANT = "assistant"
PARTS = {"data": "rl", "test_data": "evaluate_validation"}  # of the built-in reviews; the judge has seen none of them


class Demonstration(NamedTuple):
    """What a model is to write, and what stands before it.

    Attributes:
        content: the whole text, or the whole conversation.
        prompt: how many characters, or turns, at its start are given.
        where: its file and line, "" for the built-in set.
    """

    content: str | Conversation
    prompt: int = 0
    where: str = ""


class DemonstrationReader:
    """Makes a demonstration of each row of a table; the first row of a known form decides all.

    Args:
        field: the configuration key that gave the table, for error messages.
        text_column, prompt_column: names of the columns; None for the usual ones.
    """

    def __init__(self, field: str, text_column: str | None = None, prompt_column: str | None = None) -> None:
        self.field, self.text_column, self.prompt_column = field, text_column, prompt_column
        self.form: tuple[str, ...] | None = None

    def __call__(self, row: Row) -> Demonstration:
        """Return the demonstration of `row`.

        Raises:
            DataError: an absent, empty or unsuitable value, a prompt and a completion of two kinds, a conversation
                that does not end with an answer; with its row.
        """
        form = self.form = self.form or self._form(row)
        for column in form:
            require_column(row, column, self.field, "text" if column == form[-1] else "prompt")
        values = [cell(row, column, self.field) for column in form]
        check_kinds(row, form, values, self.field)
        if all(isinstance(value, str) for value in values):
            prompt = "".join(map(str, values[:-1]))
            return Demonstration(prompt + str(values[-1]), len(prompt), row.where)
        return answered(row, form, values, self.field, sum(map(len, values[:-1])))

    def _form(self, row: Row) -> tuple[str, ...]:
        if self.text_column is not None or self.prompt_column is not None:
            last = self.text_column or "completion"
            return (last,) if self.prompt_column is None else (self.prompt_column, last)
        form = next((form for form in FORMS if all(column in row for column in form)), None)
        if form is None:
            raise DataError(self.field, listed(row, row.where), NAMED, column_hint("text", row))
        return form


def builtin_demonstrations(source: str, field: str, split: str | None) -> list[Demonstration] | None:
    """Return the texts of built-in data, of the part that `field` (data or test_data) reads; None for other sources.

    Raises:
        DataError: a split of the built-in set.
    """
    if source not in BUILTIN_DATA:
        return None
    if split is not None:
        raise DataError(field, f"{source} with split {split!r}", "data with splits", "Leave the split out.")
    return [Demonstration(row.text) for row in labelled(source, PARTS[field], field=field)]


def answered(
    row: Row, columns: Sequence[str], values: Sequence[Any], field: str, prompt: int, *, calls_last: bool = True
) -> Demonstration:
    """Return the conversation of the turns in `columns`, which has to end with an answer, `prompt` turns of it given.

    Raises:
        DataError: as `conversation`; the last turn is not the assistant's.
    """
    turns = conversation(zip(columns, values, strict=True), row, field, calls_last=calls_last)
    if turns[-1]["role"] != ASSISTANT:
        got = f"{row.where}: {columns[-1]} ends with a turn of role {turns[-1]['role']!r}: {turns[-1]!r:.80}"
        fix = "End it with the assistant's answer, or pass --skip_bad_rows to leave such rows out."
        raise DataError(field, got, "a conversation that ends with an answer", fix)
    return Demonstration(turns, prompt, row.where)


def require_column(row: Row, column: str, field: str, kind: str = "text") -> None:
    """Raise DataError for a row without `column`, or with nothing in it; `kind` is the flag's that names another."""
    if column not in row:
        fix = column_hint(kind, row, column)
        raise DataError(field, listed(row, row.where), f"a column {column!r}", fix)
    if row[column] is None or isinstance(row[column], str):
        require(row, column, field=field)


def cell(row: Row, column: str, field: str) -> str | list[Any]:
    """Return the text, or the list of messages, in `column`. Raises DataError for anything else."""
    value = row[column] if column == "text" else from_cell(row, column, field)
    if is_conversation(value):
        turns: list[Any] = value
        return turns
    if column == "messages" or (isinstance(value, list) and any(isinstance(one, dict) for one in value)):
        got = f"{row.where}: {column} = {value!r:.60}"
        fix = 'Write [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}].'
        raise DataError(field, got, "a list of messages, each with its role", fix)
    return check_text(row, column, field=field)


def check_kinds(row: Row, columns: Sequence[str], values: Sequence[Any], field: str) -> None:
    """Raise DataError unless the `values` in `columns` are all texts, or all conversations."""
    kinds = {isinstance(value, str) for value in values}
    if len(kinds) > 1:
        named = ", ".join(
            f"{c} = {'text' if isinstance(v, str) else 'messages'}" for c, v in zip(columns, values, strict=True)
        )
        fix = "Write all of them as text, or all as lists of messages."
        raise DataError(field, f"{row.where}: {named}", "values of one kind", fix)
