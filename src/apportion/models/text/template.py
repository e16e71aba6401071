"""A response inside a reward model's own chat template: where it stands, and how a template may change it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from difflib import SequenceMatcher
from typing import Any, NamedTuple

from apportion.errors import ModelError, ScoreError
from apportion.models.text.chat import (
    TemplateError,
    apply_template,
    in_words,
    missing_pieces,
    unused_word,
    with_response,
)
from apportion.models.text.token_spans import PolicyText, Span

Turns = Sequence[Mapping[str, Any]]

# a placeholder that locates the response in a rendered chat template; no suffix of it is also a prefix of it, so that
# it cannot be found at a shifted offset together with adjacent characters
MARK = "RESPONSE"
PLAIN = "It is short, and that is all."
THINKING = (  # the second where the prompt ends with the opening tag
    "<think>\nHow long is it?\n</think>\n\nIt is short, and that is all.",
    "How long is it?</think> It is short, and that is all.",
)
CHANGES = (
    "its chat template changes answers with <think>: they are scored in its own rendering, and credit follows the text "
    "that both have"
)


class Answer(NamedTuple):
    """A rendered response: the text before it, the response as shown, the text after it, and where its characters are.

    `starts` and `ends` are the offsets in `shown` of each character of the response; equal for one that is not shown.
    """

    before: str
    shown: str
    after: str
    starts: list[int]
    ends: list[int]

    def place(self, span: Span) -> Span:
        """Return the span in the rendered text of [first, end) of the response."""
        first, end, offset = *span, len(self.before)
        if first < end:
            return offset + self.starts[first], offset + self.ends[end - 1]
        at = self.ends[first - 1] if 0 < first <= len(self.ends) else 0
        return offset + at, offset + at


def answer(tokenizer: Any, turns: Turns, response: str, row: int = 0) -> Answer:
    """Return `response` as the next turn of the conversation, or as the rest of its last turn where that is the
    assistant's, rendered by the tokenizer's chat template.

    Where the template changes the response (it trims it, drops its thoughts, or moves them), characters are found by
    the longest common parts in order; those that are not shown have no place.

    Raises:
        ModelError: the template cannot render the conversation, or does not render a response exactly once.
        ScoreError: a response changes the text around its place, so that it cannot be separated from the prompt.
    """
    mark = unused_word(MARK, turns)
    marked = _rendered(tokenizer, turns, mark)
    if marked.count(mark) != 1:
        got = f"one that renders a response {marked.count(mark)} times"
        fix = "Give prompts as text, or fix the template: the response cannot be located otherwise."
        raise ModelError("reward_model's chat template", got, "one that renders it once", fix)
    before, after = marked.split(mark)
    text = _rendered(tokenizer, turns, response)
    if not text.startswith(before):
        before = opening(tokenizer, turns, before, text) or before
    length = len(text) - len(before) - len(after)
    if length < 0 or not (text.startswith(before) and text.endswith(after)):
        expected = "a response that the reward model's chat template renders in its place"
        fix = "The template moves parts of it elsewhere, and credit would land on the wrong tokens."
        raise ScoreError("response", response[:60], expected, fix, row=row)
    shown = text[len(before) : len(before) + length]
    return Answer(before, shown, after, *_places(response, shown))


def opening(tokenizer: Any, turns: Turns, before: str, text: str) -> str | None:
    """Return the rendered conversation, with or without a generation prompt, that both `before` and `text` begin with.

    Templates write an empty <think> part before an answer without thoughts, so that one with thoughts begins earlier.
    None where neither is.
    """
    for generation in (True, False):
        with contextlib.suppress(TemplateError):
            one = apply_template(tokenizer, turns, generation=generation)
            if before.startswith(one) and text.startswith(one):
                return one
    return None


def _places(response: str, shown: str) -> tuple[list[int], list[int]]:
    """Return (start, end) in `shown` of each character of `response`."""
    skipped = _skipped(response, shown)
    if skipped is None:
        return _aligned(response, shown)
    starts = [min(max(at - skipped, 0), len(shown)) for at in range(len(response) + 1)]
    return starts[:-1], starts[1:]


def _skipped(response: str, shown: str) -> int | None:
    """Return how many of the response's first characters are missing in its rendered part; None if that is not all."""
    if shown == response.rstrip() or shown == response:
        return 0
    if shown in (response.strip(), response.lstrip()):
        return len(response) - len(response.lstrip())
    first = response.find(shown)
    return first if shown and first >= 0 and first == response.rfind(shown) else None


def _aligned(response: str, shown: str) -> tuple[list[int], list[int]]:
    """Return what `_places` does by the longest common parts in order, the leftmost of several.

    Characters that stand in the place of others are spread evenly over them.
    """
    starts, ends = [0] * len(response), [0] * len(response)
    matcher = SequenceMatcher(None, response, shown, autojunk=False)
    for _, first, last, start, end in matcher.get_opcodes():  # equal, replaced or (where end is start) not shown
        size = last - first
        for i in range(size):
            starts[first + i] = start + i * (end - start) // size
            ends[first + i] = start + (i + 1) * (end - start) // size
    return starts, ends


def _rendered(tokenizer: Any, turns: Turns, response: str) -> str:
    try:
        return apply_template(tokenizer, with_response(turns, response), generation=False)
    except TemplateError as error:
        fix = "Give prompts as text, or turns that this reward model's template knows."
        got = in_words(turns, error)
        raise ModelError("reward_model's chat template", got, "turns that it can render", fix) from error


def check_template(field: str, tokenizer: Any, policy: PolicyText) -> str | None:
    """Return a note where the tokenizer's chat template changes answers with thoughts; tried before sampling.

    One conversation of each order of roles is rendered, with a plain answer and with one that thinks first.

    Raises:
        ModelError: it renders no such conversation, leaves a turn's text out, changes a plain answer, or moves thoughts
            out of the answer.
    """
    note: str | None = None
    for turns in one_of_each(policy.conversations.values()):
        if answer(tokenizer, turns, PLAIN).shown != PLAIN:
            fix = "Give prompts as text, or fix the template: credit could not be traced to the policy's tokens."
            raise ModelError(f"{field}'s chat template", "one that changes a plain answer", "one that keeps it", fix)
        _check_shown(field, tokenizer, turns)
        try:
            if any(answer(tokenizer, turns, thinking).shown != thinking for thinking in THINKING):
                note = CHANGES
        except ScoreError as error:
            got = "one that moves an answer's <think> part out of the answer"
            fix = "Give prompts as text, or use a template that keeps thoughts in their answer."
            raise ModelError(f"{field}'s chat template", got, "one that renders an answer in one place", fix) from error
    return note


def _check_shown(field: str, tokenizer: Any, turns: Turns) -> None:
    """Raise ModelError where the template leaves the text of one of `turns` out, so that it would not be scored."""
    whole = with_response(turns, PLAIN)
    lost = next(
        (one for one in missing_pieces(tokenizer, whole, apply_template(tokenizer, whole, generation=False), False)
         if one.required), None,
    )  # fmt: skip
    if lost is not None:
        role = whole[lost.turn]["role"]
        got = f"one that drops {lost.what} {lost.text!r:.80} (role {role!r}, turn {lost.turn + 1}) of a prompt"
        fix = "The score would not see it: use roles that this reward model's template knows, or give prompts as text."
        raise ModelError(f"{field}'s chat template", got, "every turn's text in what it renders", fix)


def renders_alike(policy: PolicyText, tokenizer: Any) -> bool:
    """Whether a tokenizer renders the policy's conversations, up to the end of an answer, as the policy's own does."""
    if str(policy.tokenizer.chat_template or "").strip() == str(tokenizer.chat_template).strip():
        return True
    for turns in one_of_each(policy.conversations.values()):
        theirs = answer(tokenizer, turns, PLAIN)
        try:
            ours = apply_template(policy.tokenizer, turns, generation=True)
        except TemplateError:  # although it rendered these for the prompts
            return False
        if theirs.before + theirs.shown != f"{ours}{PLAIN}":
            return False
    return True


def one_of_each(conversations: Iterable[Turns]) -> list[Turns]:
    """Return one conversation of each order of roles, with and without text, calls and tools, and of each switch."""
    kinds: dict[Any, Turns] = {}
    for turns in conversations:
        variables = getattr(turns, "template_kwargs", {})
        switches = frozenset((name, value if isinstance(value, bool) else None) for name, value in variables.items())
        shapes = tuple((turn.get("role"), bool(turn.get("content")), bool(turn.get("tool_calls"))) for turn in turns)
        kinds.setdefault((shapes, bool(getattr(turns, "tools", None)), switches), turns)
    return list(kinds.values())
