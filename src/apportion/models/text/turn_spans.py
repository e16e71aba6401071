"""Where a turn of the assistant stands in a rendered conversation, from its first generated character to its end."""

from __future__ import annotations

from typing import Any

from apportion.data.conversations import Conversation
from apportion.models.text.chat import TemplateError, after_thoughts, apply_template, as_text, unused_word

MARK = "ANSWER"  # in the place of a turn's text; no suffix of it begins it, so that it is found where it stands only

TurnSpan = tuple[int, int]  # [start, end) in characters


def turn_span(tokenizer: Any, shown: Conversation, text: str, place: int) -> TurnSpan | None:
    """Return the characters [start, end) of `text` that turn `place` of `shown` writes, its end of turn included.

    It starts where the generation prompt ends, as it does when the turn is sampled, and ends where the conversation up
    to this turn ends. Where the template renders an earlier turn otherwise than a last one (it drops its thoughts), the
    turn is found by a mark in its place. None where it is not located with certainty.

    Args:
        shown: the conversation in the form that was rendered. text: what the chat template made of it, whole.
    """
    last = place == len(shown) - 1
    marked = _marked(tokenizer, shown, text, place)
    start = _prefix(tokenizer, shown.with_turns(shown[:place]), text, generation=True) if place else 0
    if start is None and marked is not None:
        start = marked[0]
    end = len(text) if last else _prefix(tokenizer, shown.with_turns(shown[: place + 1]), text, generation=False)
    if end is None and marked is not None:
        end = marked[1]
    if start is None or end is None or start >= end:
        return None
    said = after_thoughts(as_text([shown[place]])[0]["content"])
    return (start, end) if said in text[start:end] else None


def _prefix(tokenizer: Any, turns: Conversation, text: str, *, generation: bool) -> int | None:
    """Return the length of the rendered `turns`, where `text` begins with them."""
    try:
        before = apply_template(tokenizer, turns, generation=generation)
    except TemplateError:
        return None
    return len(before) if text.startswith(before) else None


def _marked(tokenizer: Any, shown: Conversation, text: str, place: int) -> TurnSpan | None:
    """Return the span of the turn's text and its end, found by a mark in the place of its text."""
    if not as_text([shown[place]])[0]["content"].strip():
        return None
    mark = unused_word(MARK, shown)
    content = [{"type": "text", "text": mark}] if isinstance(shown[place]["content"], list) else mark
    turn = {**shown[place], "content": content}
    try:
        whole = apply_template(
            tokenizer, shown.with_turns([*shown[:place], turn, *shown[place + 1 :]]), generation=False
        )
        alone = apply_template(tokenizer, shown.with_turns([*shown[:place], turn]), generation=False)
    except TemplateError:  # it may judge what a turn says
        return None
    if whole.count(mark) != 1 or alone.count(mark) != 1:
        return None
    before, after = whole.split(mark)
    tail = alone.split(mark)[1]
    if not (text.startswith(before) and text.endswith(after) and after.startswith(tail)):
        return None
    end = len(text) - len(after) + len(tail)
    return (len(before), end) if len(before) < end else None
