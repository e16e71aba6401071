"""Conversations in rows of a table: turns with text, parts of text or tool calls, and the chat template's inputs."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from apportion.data.formats import Row
from apportion.data.tables import check_text
from apportion.errors import DataError

Turn = dict[str, Any]  # role, content (text, parts of text, or None beside a tool call), and keys for the template

# what a turn may hold in place of a content
IN_PLACE_OF_CONTENT = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking")
# arguments of `apply_chat_template` that are no variables of a template
RESERVED = frozenset({
    "conversation", "messages", "tools", "chat_template", "add_generation_prompt", "continue_final_message", "tokenize",
    "sanitize_control_tokens", "padding", "truncation", "max_length", "return_tensors", "return_dict",
    "return_assistant_tokens_mask", "tokenizer_kwargs",
})  # fmt: skip
_LIKE_MESSAGES = re.compile(r"""\s*\[\s*\{\s*['"](role|content)['"]\s*:""")
_OF_ARROW = re.compile(r", row \d+$")  # the location of a row of Parquet or of a hub dataset


class Conversation(list[Turn]):
    """The turns of a conversation, a list of {role, content, ...}, and what else its chat template is given.

    Attributes:
        tools: JSON schemas of the functions that the conversation may call; None for none.
        template_kwargs: further variables of the chat template, such as enable_thinking.
    """

    __slots__ = ("template_kwargs", "tools")

    def __init__(
        self,
        turns: Iterable[Turn] = (),
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(turns)
        self.tools, self.template_kwargs = tools, dict(template_kwargs or {})

    def with_turns(self, turns: Iterable[Turn]) -> Conversation:
        """Return a conversation of these turns with the same tools and variables."""
        return Conversation(turns, self.tools, self.template_kwargs)


def conversation(
    parts: Iterable[tuple[str, Sequence[Any]]], row: Row, field: str, *, calls_last: bool = False
) -> Conversation:
    """Return the conversation of the turns in columns of `row`, one after another, with its tools and variables.

    A turn's content may be a text, also an empty one, parts of text ({"type": "text", "text": ...}), or null or absent
    beside tool calls. A key whose value is null is absent; in rows of Parquet or of a hub dataset also inside tool
    calls and tools, where Arrow gives every row the keys of all others.

    Args:
        parts: (column, its turns) in their order.
        calls_last: whether the last turn may be a tool call, which has no content.

    Raises:
        DataError: another content, a turn without role, no text at all, a tool call at the end; with the location.
    """
    arrow = _OF_ARROW.search(row.where) is not None
    named = [(f"{row.where}: {column}[{i}]", item) for column, turns in parts for i, item in enumerate(turns)]
    made = [_turn(item, where, field, arrow) for where, item in named]
    if not any(_says_something(turn) for turn in made):
        got = f"{named[0][0]}: content = {made[0].get('content')!r:.20}"
        raise DataError(field, got, "a turn with text", "Fill it in or remove the row.")
    if not calls_last and made[-1]["role"] == "assistant" and made[-1].get("content") is None:
        got = f"{named[-1][0]}, the last turn, an assistant's without content"
        fix = "Add the tool's answer, or remove the turn."
        raise DataError(field, got, "a last turn that can be answered or continued", fix)
    return Conversation(made, _tools(row, field, arrow), _variables(row, field))


def from_cell(row: Row, column: str, field: str) -> Any:
    """Return the value in `column` of `row`; text that is a list of messages in JSON is that list, since CSV has none.

    Raises:
        DataError: text that looks like messages and is not JSON (a Python list that was printed, say).
    """
    value = row[column]
    if not isinstance(value, str) or not value.lstrip().startswith("["):
        return value
    parsed = _parsed(value)
    if isinstance(parsed, list) and parsed and all(isinstance(one, dict) and "role" in one for one in parsed):
        return parsed
    if _LIKE_MESSAGES.match(value):
        fix = "Write the cell with json.dumps, each turn with role and content."
        raise DataError(field, f"{row.where}: {column} = {value!r:.60}", "a conversation as JSON", fix)
    return value


def without_nulls(value: Any) -> Any:
    """Return `value` without the keys of nested objects whose value is None."""
    if isinstance(value, Mapping):
        return {key: without_nulls(one) for key, one in value.items() if one is not None}
    return [without_nulls(one) for one in value] if isinstance(value, list) else value


def _turn(item: Any, where: str, field: str, arrow: bool) -> Turn:
    if not isinstance(item, Mapping):
        fix = 'Write {"role": "user", "content": "..."}.'
        raise DataError(field, f"{where} = {item!r:.60}", "an object with role and content", fix)
    turn = Row({key: value for key, value in item.items() if value is not None or key == "content"}, where)
    check_text(turn, "role", field=field)
    content = turn.get("content")
    if isinstance(content, (list, tuple)):
        turn["content"] = [_part(part, f"{where}: content[{i}]", field) for i, part in enumerate(content)]
    elif content is None and any(turn.get(key) for key in IN_PLACE_OF_CONTENT):
        pass
    elif not isinstance(content, str) or content.strip():  # an empty text is one
        check_text(turn, "content", field=field)
    return {key: without_nulls(value) if arrow else value for key, value in turn.items()}


def _says_something(turn: Turn) -> bool:
    content = turn.get("content") or ""
    texts = [content] if isinstance(content, str) else [part["text"] for part in content]
    return any(text.strip() for text in texts) or any(turn.get(key) for key in IN_PLACE_OF_CONTENT)


def _part(item: Any, where: str, field: str) -> dict[str, Any]:
    if not isinstance(item, Mapping):
        fix = 'Write {"type": "text", "text": "..."}.'
        raise DataError(field, f"{where} = {item!r:.60}", "an object with type and text", fix)
    part = Row({key: value for key, value in item.items() if value is not None}, where)
    if part.get("type", "text") != "text":
        fix = "Only text is read: remove the part, or set skip_bad_rows to true to leave such rows out."
        raise DataError(field, f"{where}: type = {part['type']!r:.40}", "a part of type 'text'", fix)
    if not isinstance(part.get("text"), str) or part["text"].strip():
        check_text(part, "text", field=field)
    return {"type": "text", **part}


def _variables(row: Row, field: str) -> dict[str, Any]:
    """Return the column chat_template_kwargs, {} without one."""
    value = row.get("chat_template_kwargs")
    value = _parsed(value) if isinstance(value, str) and value.strip() else value or {}
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        got = f"{row.where}: chat_template_kwargs = {value!r:.60}"
        fix = 'Write {"enable_thinking": false}, or rename the column.'
        raise DataError(field, got, "an object of the chat template's variables", fix)
    if RESERVED & set(value):
        got = f"{row.where}: chat_template_kwargs with {sorted(RESERVED & set(value))[0]!r}"
        fix = "Remove it: it is set for every prompt. A row's tools stand in a column of their own."
        raise DataError(field, got, "variables of the chat template", fix)
    return {key: one for key, one in value.items() if one is not None}


def _tools(row: Row, field: str, arrow: bool) -> list[dict[str, Any]] | None:
    """Return the JSON schemas in the column tools, None without any."""
    value = row.get("tools")
    arrow = arrow and not isinstance(value, str)  # nulls of a text are its own
    value = _parsed(value) if isinstance(value, str) and value.strip() else value
    if not value:
        return None
    listed = value if isinstance(value, list) else [None]
    texts = [isinstance(one, str) for one in listed]
    schemas: list[Any] = [_parsed(one) if text else one for one, text in zip(listed, texts, strict=True)]
    if not all(isinstance(one, dict) for one in schemas):
        got = f"{row.where}: tools = {row['tools']!r:.60}"
        fix = "Write a list of JSON schemas, or rename the column."
        raise DataError(field, got, "a list of JSON schemas of functions", fix)
    return [without_nulls(one) if arrow and not text else one for one, text in zip(schemas, texts, strict=True)]


def _parsed(text: str) -> Any:
    """Return the JSON value of `text`; the text itself where it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text
