"""Where a turn of the assistant stands in a rendered conversation, from its first generated character to its end."""

from __future__ import annotations

from typing import Any

from apportion.data.conversations import Conversation, Turn
from apportion.models.text.chat import TemplateError, after_thoughts, apply_template, as_text, unused_word

MARK = "ANSWER"  # in the place of a turn's text; no suffix of it begins it, so that it is found where it stands only

TurnSpan = tuple[int, int]  # [start, end) in characters


def turn_span(tokenizer: Any, shown: Conversation, text: str, place: int) -> TurnSpan | None:
    """Return the characters [start, end) of `text` that turn `place` of `shown` writes, its end of turn included.

    It starts where the generation prompt ends, as it does when the turn is sampled, and ends where the conversation up
    to this turn ends. Where the template renders an earlier turn otherwise than a last one (it drops its thoughts), the
    turn is found by a mark in the place of its text. None where it is not located with certainty.

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
    answer = after_thoughts(as_text([shown[place]])[0]["content"])
    return (start, end) if answer in text[start:end] else None


def _prefix(tokenizer: Any, turns: Conversation, text: str, *, generation: bool) -> int | None:
    """Return the length of the rendered `turns`, where `text` begins with them."""
    try:
        before = apply_template(tokenizer, turns, generation=generation)
    except TemplateError:
        return None
    return len(before) if text.startswith(before) else None


def _marked(tokenizer: Any, shown: Conversation, text: str, place: int) -> tuple[int | None, int] | None:
    """Return (start, end) of the turn, found by a mark in the place of its text, or of the name of its first call.

    The start is None where a call was marked, whose name does not begin its turn.
    """
    mark = unused_word(MARK, shown)
    turn, is_text = _with_mark(shown[place], mark)
    if turn is None:
        return None
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
    return len(before) if is_text else None, len(text) - len(after) + len(tail)


def _with_mark(turn: Turn, mark: str) -> tuple[Turn | None, bool]:
    """Return (the turn with `mark` in the place of its text, or of a call's name; None without any, which it was)."""
    content = turn.get("content")
    if as_text([turn])[0]["content"].strip():
        return {**turn, "content": [{"type": "text", "text": mark}] if isinstance(content, list) else mark}, True
    calls = turn.get("tool_calls")
    if not isinstance(calls, list) or not calls or not isinstance(calls[0], dict):
        return None, False
    inner = calls[0].get("function")
    named = {**calls[0], "function": {**inner, "name": mark}} if isinstance(inner, dict) else {**calls[0], "name": mark}
    return {**turn, "tool_calls": [named, *calls[1:]]}, False
