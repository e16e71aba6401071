"""Labelled texts for a tokenizer: conversations in its chat template, and ids with the length of their prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from apportion.data.answers.ranking_rows import Ranking
from apportion.data.conversations import Conversation
from apportion.data.label_rows import Labelled, Render
from apportion.errors import DataError, ModelError
from apportion.models.text.chat import (
    ASSISTANT,
    TemplateError,
    after_thoughts,
    apply_template,
    as_text,
    render_conversation,
    unused_word,
    with_response,
)
from apportion.models.text.template import opening

MARK = "ANSWER"  # in the place of the answer; no suffix of it begins it, so that it is found where it stands only
CHARACTERS = 400  # of a text for each token that an excerpt may have: what a few windows need


def chat_renderer(load: Callable[[], Any]) -> Render:
    """Return a function that renders a labelled conversation by the chat template of the tokenizer that `load` returns.

    The tokenizer is loaded with the first conversation, so that tables of texts are read without one.

    Its errors:
        ModelError: the tokenizer has no chat template.
        DataError: as `render_conversation`; the template changes the answer, so that its place is not certain, or the
            last turn is not an assistant's text. With the row.
    """
    loaded = cache(load)

    def render(turns: Conversation, where: str, field: str) -> tuple[str, str]:
        if not loaded().chat_template:
            fix = "Use a model with a chat template, or give the texts as it scores them, in a column 'text'."
            got = f"a tokenizer without a chat template, and conversations in {field}"
            raise ModelError("model's tokenizer", got, "a chat template", fix)
        return _split(loaded(), turns, where, field)

    return render


def ranked_texts(ranking: Ranking, render: Render, field: str) -> list[Labelled]:
    """Return the completions of a ranking behind its prompt, without labels (0). Raises as `render`."""
    prompt, made = ranking.prompt, list[Labelled]()
    for completion in ranking.completions:
        if isinstance(prompt, str):
            made.append(Labelled(prompt + str(completion), 0, len(prompt)))
            continue
        turns = with_response(prompt, completion) if isinstance(completion, str) else [*prompt, *completion]
        before, answer = render(prompt.with_turns(turns), ranking.where, field)
        made.append(Labelled(before + answer, 0, len(before), rendered=True))
    return made


def _split(tokenizer: Any, turns: Conversation, where: str, field: str) -> tuple[str, str]:
    """Return (the rendered text before the answer, the answer and what follows it)."""
    last = as_text(turns)[-1]
    answer = last["content"]
    if last["role"] != ASSISTANT or not answer.strip():
        got = f"{where}: the last turn is {turns[-1]!r:.80}"
        fix = "End each conversation with the answer that the label judges."
        raise DataError(field, got, "a text of role 'assistant'", fix)
    text, shown, _ = render_conversation(field, tokenizer, turns, where=where, generation=False)
    start = _start(tokenizer, shown, text)
    if start is None or after_thoughts(answer) not in text[start:]:
        got = f"{where}: turn {len(turns)} (role 'assistant'), which the chat template changes, or does not render once"
        fix = "Give rows as prompt and completion in text, or use a model whose template renders the answer as it is."
        raise DataError(field, got, "an answer that the template renders once and unchanged", fix)
    return text[:start], text[start:]


def _start(tokenizer: Any, shown: Conversation, text: str) -> int | None:
    """Return where the answer begins in the rendered `text`; None where that is not certain."""
    mark = unused_word(MARK, shown)
    content = [{"type": "text", "text": mark}] if isinstance(shown[-1]["content"], list) else mark
    try:
        marked = apply_template(
            tokenizer, shown.with_turns([*shown[:-1], {**shown[-1], "content": content}]), generation=False
        )
    except TemplateError:  # it may judge what the answer is
        return None
    before = marked[: marked.find(mark)]
    if marked.count(mark) != 1:
        return None
    # `before` is what the template writes before an answer without thoughts; one with thoughts may begin earlier
    found = before if text.startswith(before) else opening(tokenizer, shown.with_turns(shown[:-1]), before, text)
    return None if found is None else len(found)


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
