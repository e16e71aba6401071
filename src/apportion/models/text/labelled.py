"""Labelled texts for a tokenizer: conversations in its chat template, and ids with the length of their prompts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import count
from typing import Any

from apportion.data.formats import Row
from apportion.data.label_rows import Labelled, Messages, Render
from apportion.errors import DataError, ModelError

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
    *before, last = messages
    answer = last.get("content")
    if last["role"] != "assistant" or not isinstance(answer, str) or not answer.strip():
        got = f"{row.where}: the last message is {last!r:.80}"
        fix = "End each conversation with the answer that the label judges."
        raise DataError(field, got, "a text of role 'assistant'", fix)
    mark = next(mark for mark in map(MARK.format, count()) if not any(mark in str(one) for one in messages))
    text = _rendered(tokenizer, messages, row, field)
    marked = _rendered(tokenizer, [*before, {**last, "content": mark}], row, field)
    start = marked.find(mark)
    if marked.count(mark) != 1 or not text.startswith(marked[:start]) or answer.strip() not in text[start:]:
        got = f"{row.where}: message {len(messages)} (assistant), which the chat template changes or leaves out"
        fix = "Give rows as prompt and completion in text, or use a model whose template renders the answer as it is."
        raise DataError(field, got, "an answer that the template renders once and unchanged", fix)
    _check_rendered(text[:start], before, row, field)
    return text[:start], text[start:]


def _check_rendered(text: str, messages: Messages, row: Row, field: str) -> None:
    """Raise DataError for a message whose text is not in the rendered `text`, as often as messages have it."""
    contents = [one["content"].strip() if isinstance(one.get("content"), str) else "" for one in messages]
    for number, (message, content) in enumerate(zip(messages, contents, strict=True), 1):
        if content and text.count(content) < contents.count(content):  # templates may move a system message
            got = f"{row.where}: message {number} ({message['role']}), which the chat template leaves out or changes"
            fix = "Use roles that the template of this model knows, or a model whose template renders them."
            raise DataError(field, got, "every message's text in the rendered conversation", fix)


def _rendered(tokenizer: Any, messages: Messages, row: Row, field: str) -> str:
    given = {name: row[name] for name in ("tools",) if row.get(name)}
    more = row.get("chat_template_kwargs")
    try:
        given |= more if isinstance(more, Mapping) else {}
        cleaned = [_without_nulls(message) for message in messages]
        return str(tokenizer.apply_chat_template(cleaned, tokenize=False, add_generation_prompt=False, **given))
    except Exception as error:  # a template is a program that may raise anything
        got = f"{row.where}: a conversation ({(str(error).splitlines() or [type(error).__name__])[0]})"
        fix = "Give prompt and completion as text, or messages that the template of this model knows."
        raise DataError(field, got, "one that the model's chat template renders", fix) from error


def _without_nulls(message: Mapping[str, Any]) -> dict[str, Any]:
    """Return a message without the keys that are null because another row of an Arrow column has them."""

    def cleaned(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: cleaned(inner) for key, inner in value.items() if inner is not None}
        return [cleaned(inner) for inner in value] if isinstance(value, list) else value

    return {key: cleaned(value) for key, value in message.items() if value is not None or key == "content"}


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
