"""Forms of a labelled row: a text, a conversation, a prompt and its completion, or the two texts of a pair."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from apportion.data.bad_rows import ColumnError
from apportion.data.conversations import Conversation, conversation, from_cell
from apportion.data.formats import Row
from apportion.data.formats.rows import listed, similar
from apportion.data.labels import label_of
from apportion.data.tables import check_text, require
from apportion.errors import DataError

# (conversation, its file and line, field of an error) -> (everything before the last turn's text, that text and on)
Render = Callable[[Conversation, str, str], tuple[str, str]]

FORMS = (("text",), ("messages",), ("prompt", "completion"))  # the first that a row with a label has
PAIR = ("chosen", "rejected")  # of a row without a label, with or without a prompt
NAMED = "a column 'text', 'messages', or 'prompt' and 'completion'"
OTHER_NAMES = {  # of such columns in public sets
    "text": ("review", "sentence", "content", "comment", "body", "document", "response", "answer", "output", "tweet"),
    "label": ("labels", "sentiment", "target", "class", "polarity", "is_positive", "y", "rating", "stars", "score"),
}


class Labelled(NamedTuple):
    """A text and its label, 1 good or 0 bad.

    Attributes:
        prompt: how many characters at its start are what it responds to.
        paired: whether it is one of the two texts of a preference pair, which follow one another, the chosen one first.
        rendered: whether a chat template made it, so that it has its special tokens already.
    """

    text: str
    label: int
    prompt: int = 0
    paired: bool = False
    rendered: bool = False


class Layout(NamedTuple):
    """The columns and splits of labelled data that settings name; None for the usual ones."""

    text_column: str | None = None
    prompt_column: str | None = None
    label_column: str | None = None
    split: str | None = None
    test_split: str | None = None

    @classmethod
    def of(cls, settings: Any) -> Layout:
        """Return the layout in the settings of a stage, which have these names."""
        return cls(*(getattr(settings, name) for name in cls._fields))


class RowReader:
    """Makes a labelled text, or the two of a pair, of each row of a table; the first row of a known form decides all.

    Args:
        layout: the names of the columns.
        field: the configuration key that gave the table, for error messages.
        render: renders conversations; None where there is no chat template.
        pairs: whether preference pairs are read as well.
        labels: whether rows have a label; without, all texts are good ones.

    Attributes:
        equal: pairs of two equal texts so far. Their loss has no gradient, so they are no rows.
    """

    def __init__(
        self, layout: Layout, field: str, render: Render | None = None, pairs: bool = False, labels: bool = True
    ) -> None:
        self.layout, self.field, self.render, self.pairs, self.labels = layout, field, render, pairs, labels
        self.form: tuple[str, ...] | None = None
        self.equal = 0

    def __call__(self, row: Row) -> tuple[Labelled, ...]:
        """Return the labelled text of `row`, or the chosen and the rejected text of a pair; nothing for two equal ones.

        Raises:
            ColumnError: preference pairs where none are read, or labels in another scale.
            DataError: an absent, empty or unsuitable value, a conversation that cannot be rendered, answers to two
                conversations; with its row.
        """
        form = self.form = self.form or self._form(row)
        if form[-2:] == PAIR:
            return self._pair(row, form)
        label_column = self.layout.label_column or "label"
        for column in form:
            self._require(row, column, "text" if column == form[-1] else "prompt")
        if self.labels:
            self._require(row, label_column, "label")
        values = [self._value(row, column) for column in form]
        prompt, text = self._texts(row, form, values)
        label = label_of(row, label_column, self.field) if self.labels else 1
        rendered = not isinstance(values[-1], str)
        return (Labelled(prompt + text, label, len(prompt), rendered=rendered),)

    def _form(self, row: Row) -> tuple[str, ...]:
        text, prompt, label = self.layout.text_column, self.layout.prompt_column, self.layout.label_column
        if row.keys() >= set(PAIR) and text is None and (label or "label") not in row:
            if not self.pairs:
                fix = "Give single texts with their labels: pairs are read by `apportion reward`."
                raise ColumnError(self.field, listed(row, row.where), f"{NAMED}, and a label; no preference pairs", fix)
            named = prompt or ("prompt" if "prompt" in row else None)
            return PAIR if named is None else (named, *PAIR)
        if text is not None or prompt is not None:
            last = text or "completion"
            return (last,) if prompt is None else (prompt, last)
        form = next((form for form in FORMS if all(column in row for column in form)), None)
        if form is None:
            raise DataError(self.field, listed(row, row.where), NAMED, column_hint("text", row))
        return form

    def _pair(self, row: Row, form: tuple[str, ...]) -> tuple[Labelled, ...]:
        """Return the chosen and the rejected text of a row."""
        for column in form:
            if column in PAIR and column not in row:
                require(row, column, field=self.field)
            self._require(row, column, "prompt")
        *before, chosen, rejected = (self._value(row, column) for column in form)
        if before and isinstance(before[0], str) and not isinstance(chosen, str) and holds(chosen, before[0]):
            before = []  # the conversations are whole: they begin with the prompt
        columns = form[-2 - len(before) :]
        made = []
        for column, answer, label in zip(PAIR, (chosen, rejected), (1, 0), strict=True):
            prompt, text = self._texts(row, (*columns[:-2], column), [*before, answer])
            made.append(Labelled(prompt + text, label, len(prompt), True, not isinstance(answer, str)))
        before_answers = {one.text[: one.prompt] for one in made}
        if len(before_answers) > 1 or isinstance(chosen, str) != isinstance(rejected, str):
            got = f"{row.where}: chosen = {chosen!r:.60}, rejected = {rejected!r:.60}"
            expected = "two texts, or two answers to one conversation"
            fix = "Remove the row, or pass --skip_bad_rows: the two cannot be compared."
            raise DataError(self.field, got, expected, fix)
        if made[0].text == made[1].text:
            self.equal += 1
            return ()
        return tuple(made)

    def _require(self, row: Row, column: str, kind: str) -> None:
        """Raise DataError for a row without a value in `column`, with the flag that names another column."""
        if column not in row:
            expected = f"a column {column!r}"
            raise DataError(self.field, listed(row, row.where), expected, column_hint(kind, row, column))
        if row[column] is None or isinstance(row[column], str):
            require(row, column, field=self.field)

    def _texts(self, row: Row, form: tuple[str, ...], values: list[str | list[Any]]) -> tuple[str, str]:
        """Return (prompt or "", text) of a row with `values` in its columns `form`."""
        turns = [value for value in values if not isinstance(value, str)]
        if not turns:
            return "".join(map(str, values[:-1])), str(values[-1])
        if len(turns) < len(values):
            kinds = ", ".join(f"{c} = {type(v).__name__}" for c, v in zip(form, values, strict=True))
            fix = "Write both as text, or both as lists of messages."
            raise DataError(self.field, f"{row.where}: {kinds}", "a prompt and an answer of one kind", fix)
        if self.render is None:
            got = f"{row.where}: a conversation in {' and '.join(form)}"
            fix = "Give the texts as the model scores them, in a column 'text'."
            raise ColumnError(self.field, got, "texts, since no chat template is known here", fix)
        return self.render(conversation(zip(form, turns, strict=True), row, self.field), row.where, self.field)

    def _value(self, row: Row, column: str) -> str | list[Any]:
        value = row[column] if column == "text" else from_cell(row, column, self.field)
        if is_conversation(value):
            turns: list[Any] = value
            return turns
        if column == "messages":
            got = f"{row.where}: {column} = {value!r:.60}"
            fix = 'Write [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}].'
            raise DataError(self.field, got, "a list of messages, each with its role", fix)
        return check_text(row, column, field=self.field)


def is_conversation(value: Any) -> bool:
    """Whether `value` is a list of messages, each with a role."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(one, dict) and isinstance(one.get("role"), str) for one in value)
    )


def holds(messages: Sequence[Mapping[str, Any]], prompt: str) -> bool:
    """Whether one of the `messages` before the last has the text of `prompt`."""
    contents = (message.get("content") for message in messages[:-1])
    return any(isinstance(content, str) and content.strip() == prompt.strip() for content in contents)


def column_hint(kind: str, names: Iterable[str], column: str | None = None) -> str:
    """Return the fix for a missing column of a kind: text, prompt or label."""
    present = list(names)
    near = similar(column or kind, present)
    near = near or next((name for name in present if name.lower() in OTHER_NAMES.get(kind, ())), None)
    flag = f"--{kind}_column"
    if near is None:
        return f"Name the column with {flag}, or rename it."
    return f"Did you mean {near!r}? Pass {flag} {near}, or rename it."
