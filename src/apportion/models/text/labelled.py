"""Labelled texts for a tokenizer: conversations in its chat template, and ids with the length of their prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import count
from typing import Any

from apportion.data.conversations import Conversation, conversation
from apportion.data.formats import Row
from apportion.data.label_rows import Labelled, Messages, Render
from apportion.errors import DataError, ModelError
from apportion.models.text.chat import (
    ASSISTANT,
    after_thoughts,
    apply_template,
    as_text,
    failed,
    render_conversation,
)
from apportion.models.text.template import opening

# a placeholder for the answer; no suffix of it is also a prefix of it, so that it is found where it begins only
MARK = "ANSWER{}"
CHARACTERS = 400  # of a text for each token that an excerpt may have: what a few windows need


def chat_renderer(load: Callable[[], Any]) -> Render:
    """Return a function that renders a labelled conversation by the chat template of the tokenizer that `load` returns.

    The tokenizer is loaded with the first conversation, so that tables of texts are read without one.

    Its errors:
        ModelError: the tokenizer has no chat template.
        DataError: the template cannot render the conversation, leaves out a message, or changes the answer so that its
            place is not certain; the last message is not an assistant's text. With the row.
    """
    loaded: list[Any] = []

    def render(messages: Messages, row: Row, field: str) -> tuple[str, str]:
        if not loaded:
            loaded.append(load())
        if not loaded[0].chat_template:
            fix = "Use a model with a chat template, or give the texts as it scores them, in a column 'text'."
            got = f"a tokenizer without a chat template, and conversations in {field}"
            raise ModelError("model's tokenizer", got, "a chat template", fix)
        return _split(loaded[0], messages, row, field)

    return render


def _split(tokenizer: Any, messages: Messages, row: Row, field: str) -> tuple[str, str]:
    """Return (the rendered text before the answer, the answer and what follows it)."""
    last = messages[-1]
    turns = (
        conversation(messages, row, "messages", field) if last["role"] == ASSISTANT and last.get("content") else None
    )
    answer = "" if turns is None else as_text(turns)[-1]["content"]
    if turns is None or not answer.strip():
        got = f"{row.where}: the last message is {last!r:.80}"
        fix = "End each conversation with the answer that the label judges."
        raise DataError(field, got, "a text of role 'assistant'", fix)
    text, shown, _ = render_conversation(field, tokenizer, turns, where=row.where, generation=False)
    mark = next(mark for mark in map(MARK.format, count()) if not any(mark in str(one) for one in shown))
    content = [{"type": "text", "text": mark}] if isinstance(shown[-1].get("content"), list) else mark
    marked_turns = shown.with_turns([*shown[:-1], {**shown[-1], "content": content}])
    marked = _rendered(tokenizer, marked_turns, row, field)
    start = _start(tokenizer, shown, text, marked[: marked.find(mark)])
    if marked.count(mark) != 1 or start is None or after_thoughts(answer) not in text[start:]:
        got = f"{row.where}: message {len(messages)} (assistant), which the chat template changes or leaves out"
        fix = "Give rows as prompt and completion in text, or use a model whose template renders the answer as it is."
        raise DataError(field, got, "an answer that the template renders once and unchanged", fix)
    return text[:start], text[start:]


def _start(tokenizer: Any, turns: Conversation, text: str, before: str) -> int | None:
    """Return where the answer begins in the rendered `text`; None where that is not certain.

    `before` is what the template writes before an answer without thoughts; one with thoughts may begin earlier.
    """
    found = before if text.startswith(before) else opening(tokenizer, turns.with_turns(turns[:-1]), before, text)
    return None if found is None else len(found)


def _rendered(tokenizer: Any, turns: Conversation, row: Row, field: str) -> str:
    try:
        return apply_template(tokenizer, turns, generation=False)
    except Exception as error:  # a template is a program that may raise anything
        raise failed(field, error, turns, row.where) from error


def token_rows(rows: Sequence[Labelled], tokenizer: Any, longest: int) -> tuple[list[list[int]], list[int]]:
    """Return (ids, number of ids of the prompt) of each row, without special tokens.

    Texts behind a prompt, or whole ones, are cut to what a few windows of `longest` tokens need. Ids are those of the
    whole text; where a token spans the end of the prompt, it belongs to the text behind it. The prompt of a pair is all
    that its two texts have in common at their start, so that what follows differs from its first token on.
    """
    paired = bool(rows) and rows[0].paired
    shared = [row.prompt for row in rows]
    if paired:
        both = [shared_length(a.text, b.text) for a, b in zip(rows[::2], rows[1::2], strict=True)]
        shared = [size for size in both for _ in range(2)]
    texts = [row.text[: size + CHARACTERS * longest] for row, size in zip(rows, shared, strict=True)]
    ids = [list(one) for one in tokenizer(texts, add_special_tokens=False)["input_ids"]] if texts else []
    if paired:
        common = [shared_length(a, b) for a, b in zip(ids[::2], ids[1::2], strict=True)]
        return ids, [size for size in common for _ in range(2)]
    starts = [0] * len(rows)
    prompted = [i for i, row in enumerate(rows) if row.prompt]
    if prompted:
        prompts = tokenizer([rows[i].text[: rows[i].prompt] for i in prompted], add_special_tokens=False)["input_ids"]
        for i, prompt in zip(prompted, prompts, strict=True):
            starts[i] = shared_length(prompt, ids[i])
    return ids, starts


def shared_length(one: Sequence[Any], other: Sequence[Any]) -> int:
    """Return how many items the two sequences have in common at their start."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))
