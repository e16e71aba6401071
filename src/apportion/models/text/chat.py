"""Conversations rendered by a chat template, and a search for each turn's text in the result."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import count
from typing import Any, NamedTuple

from apportion.data.conversations import RESERVED, Conversation, Turn
from apportion.errors import ConfigError, DataError, unknown_name
from apportion.models.pretrained import reason

# templates may leave the thoughts of earlier turns out; the answer after them has to be there
THOUGHTS_END = ("</think>", "</thinking>", "[/THINK]", "◁/think▷")
ROLES = 8  # that a message lists
ASSISTANT = "assistant"  # a conversation that ends with this role is continued, not answered


class TemplateError(Exception):
    """A chat template, a program that may raise anything, failed; the text is its reason."""


class Rendered(NamedTuple):
    """A conversation as its chat template renders it for generation.

    Attributes:
        text: the rendered text, with the template's own special tokens.
        turns: the conversation in the form that was rendered: contents as given, or as text, or as parts of text.
        hidden: tools, and texts in arguments of their calls, that the template leaves out, in words.
    """

    text: str
    turns: Conversation
    hidden: list[str]


class Piece(NamedTuple):
    """One text of a turn: where it is, what it is in words, the text, and the text with a unique mark inside."""

    turn: int
    what: str
    text: str
    marked: str
    required: bool  # a template may leave the arguments of tool calls out


def render_conversation(
    field: str, tokenizer: Any, conversation: Sequence[Turn], *, where: str = "", generation: bool = True
) -> Rendered:
    """Return the conversation as the tokenizer's chat template renders it: as a prompt, or (`generation` False) whole.

    A prompt ends with the generation prompt, or within a last turn of the assistant, which is continued. The content of
    each turn is tried as given, then as text, then as parts of text: the first form of which the template shows every
    turn's text (white space and JSON escapes aside). Of tool calls the names are looked for; thoughts of assistant
    turns may be left out.

    Args:
        field: the setting that the conversation is from. conversation: its turns, or a `Conversation`.
        where: its file and line.

    Raises:
        DataError: the template fails, or shows less than there is; it names the location, the turn, and its text.
    """
    given = _as_conversation(conversation)
    dropped: list[DataError] = []
    refused: list[DataError] = []
    for turns in _forms(given):
        try:
            text = apply_template(tokenizer, turns, generation=generation)
        except TemplateError as error:
            meant = type(error.__cause__).__name__ == "TemplateError"  # its `raise_exception`, no error of its code
            refused.insert(0 if meant else len(refused), failed(field, error, turns, where))
            continue
        missing = missing_pieces(tokenizer, turns, text, generation)
        lost = next((piece for piece in missing if piece.required), None)
        if lost is None:
            hidden = [f"{piece.what} {piece.text!r:.60}" for piece in missing]
            return Rendered(text, turns, hidden + _unseen_tools(tokenizer, turns, text, generation))
        dropped.append(_lost(field, lost, turns[lost.turn]["role"], where))
    raise [*dropped, *refused][0]  # what is lost of one form says more than that another fails


def apply_template(tokenizer: Any, turns: Sequence[Mapping[str, Any]], *, generation: bool) -> str:
    """Return the turns as the chat template renders them, with the tools and variables of a `Conversation`.

    With `generation` the text ends where the response begins: after the generation prompt, or within a last turn of the
    assistant. Raises TemplateError.
    """
    continued = generation and turns[-1].get("role") == ASSISTANT
    try:
        return str(
            tokenizer.apply_chat_template(
                list(turns),
                tools=getattr(turns, "tools", None),
                tokenize=False,
                add_generation_prompt=generation and not continued,
                continue_final_message=continued,
                **getattr(turns, "template_kwargs", {}),
            )
        )
    except Exception as error:
        raise TemplateError(reason(error)) from error


def with_response(turns: Sequence[Mapping[str, Any]], response: str) -> Conversation:
    """Return the conversation with the response: as a turn of its own, or as the rest of a last turn of the assistant.

    Its content is a list of parts where all others are, and else text.
    """
    made = _as_conversation(turns)
    if made[-1].get("role") == ASSISTANT:
        before, content = made[:-1], made[-1]["content"]
        joined = [*content, {"type": "text", "text": response}] if isinstance(content, list) else content + response
        return made.with_turns([*before, {**made[-1], "content": joined}])
    parts = all(isinstance(turn.get("content"), list) for turn in made)
    answer: Any = [{"type": "text", "text": response}] if parts else response
    return made.with_turns([*made, {"role": ASSISTANT, "content": answer}])


def as_text(turns: Sequence[Turn]) -> Conversation:
    """Return the turns with every content as text: parts are joined, and an absent one is empty."""
    return _as_conversation(turns).with_turns({**turn, "content": _joined(turn.get("content"))} for turn in turns)


def unused_word(stem: str, turns: Sequence[Mapping[str, Any]]) -> str:
    """Return `stem` with a number behind it, a word that is in none of the turns."""
    content = repr(list(turns))
    return next(word for word in (f"{stem}{i}" for i in count()) if word not in content)


def _as_conversation(turns: Sequence[Mapping[str, Any]]) -> Conversation:
    return turns if isinstance(turns, Conversation) else Conversation(dict(turn) for turn in turns)


def check_variables(field: str, tokenizer: Any, variables: Mapping[str, Any]) -> None:
    """Check variables of the chat template that a setting gives.

    Raises:
        ConfigError: one that the template does not have, or that is an argument of `apply_chat_template`.
    """
    stored = tokenizer.chat_template or ""
    source = stored if isinstance(stored, str) else " ".join(map(str, stored.values()))
    known = set(re.findall(r"[A-Za-z_]\w*", source))
    for name in variables:
        if name in RESERVED:
            raise ConfigError(field, name, "a variable of the chat template", "Remove it: it is set for every prompt.")
        if name not in known:
            switches = [word for word in known if "_" in word and word not in RESERVED]
            raise unknown_name(field, name, switches)


def missing_pieces(tokenizer: Any, turns: Conversation, text: str, generation: bool) -> list[Piece]:
    """Return the texts of `turns` that `text`, as which the template rendered them, does not show.

    A text may be elsewhere by coincidence (another turn's, a word of the template). So the turns are also rendered with
    a mark inside each text, and the marked texts looked for.
    """
    marked, pieces = _marked(turns)
    try:
        other = apply_template(tokenizer, marked, generation=generation)
    except TemplateError:  # it refuses the marks; what is left is to look for the texts themselves
        other = None
    shown = _squeezed(text)
    again = None if other is None else _squeezed(other)
    leaked = [_squeezed(form) for turn in turns for part in _parts(turn) for form in (str(part), json.dumps(part))]
    leaks = any(form in shown for form in leaked)  # the parts themselves, braces and all
    return [
        piece
        for piece in pieces
        if (leaks and piece.required and _parts(turns[piece.turn]))
        or not _is_in(piece.text, shown)
        or not (again is None or _is_in(piece.marked, again))
    ]


def _unseen_tools(tokenizer: Any, turns: Conversation, text: str, generation: bool) -> list[str]:
    """Return the tools of a conversation in words, where the rendered `text` is the same without them."""
    if not turns.tools:
        return []
    try:
        if apply_template(tokenizer, Conversation(turns, None, turns.template_kwargs), generation=generation) != text:
            return []
    except TemplateError:  # a template that fails without tools uses them
        return []
    return [f"the tool {tool.get('function', tool).get('name')!r:.60}" for tool in turns.tools]


def _is_in(text: str, shown: str) -> bool:
    """Whether `shown`, with single spaces, holds `text`, as it is or as JSON or Python write it inside quotes."""
    forms: tuple[Callable[[str], str], ...] = (
        str,
        lambda one: json.dumps(one, ensure_ascii=False)[1:-1],
        lambda one: json.dumps(one)[1:-1],
        lambda one: repr(one)[1:-1],
    )
    return any(_squeezed(form(text)) in shown for form in forms)


def _squeezed(text: str) -> str:
    return " ".join(text.split())


def _marked(turns: Conversation) -> tuple[Conversation, list[Piece]]:
    """Return a copy of the turns with a mark in the middle of each text, and the texts."""
    copy: list[Turn] = _copied(list(turns))
    salt = unused_word("Qz", copy)
    pieces: list[Piece] = []

    def mark(turn: int, what: str, text: str, required: bool = True) -> str:
        start = _answer_start(text) if copy[turn].get("role") == ASSISTANT else 0
        core = text[start:].strip()
        if not core:
            return text
        # inside: templates look at how a text begins and ends
        middle = text.index(core, start) + len(core) // 2
        unique = f"{salt}x{len(pieces)}Z"
        pieces.append(Piece(turn, what, core, core[: len(core) // 2] + unique + core[len(core) // 2 :], required))
        return text[:middle] + unique + text[middle:]

    for number, turn in enumerate(copy):
        for part in _parts(turn):
            part["text"] = mark(number, "the part", part["text"])
        if isinstance(turn.get("content"), str):
            turn["content"] = mark(number, "the text", turn["content"])
        for call in _calls(turn):
            if isinstance(call.get("name"), str):
                call["name"] = mark(number, "the tool call", call["name"])
            if call.get("arguments"):
                call["arguments"] = _mark_strings(call["arguments"], number, mark)
    return turns.with_turns(copy), pieces


def _mark_strings(value: Any, turn: int, mark: Callable[[int, str, str, bool], str]) -> Any:
    """Return the arguments of a tool call with a mark in each string."""
    if isinstance(value, str):
        return mark(turn, "the argument", value, False)
    if isinstance(value, dict):
        return {key: _mark_strings(one, turn, mark) for key, one in value.items()}
    return [_mark_strings(one, turn, mark) for one in value] if isinstance(value, list) else value


def _copied(value: Any) -> Any:
    """Return a copy in which nothing is shared, also where an object is in `value` twice."""
    if isinstance(value, dict):
        return {key: _copied(one) for key, one in value.items()}
    return [_copied(one) for one in value] if isinstance(value, list) else value


def after_thoughts(text: str) -> str:
    """Return the answer behind the thoughts of `text`, without white space around it."""
    return text[_answer_start(text) :].strip()


def _answer_start(text: str) -> int:
    """Return where the answer begins after thoughts, 0 without any."""
    return max((text.rfind(end) + len(end) for end in THOUGHTS_END if end in text), default=0)


def _parts(turn: Mapping[str, Any]) -> list[dict[str, Any]]:
    content = turn.get("content")
    return content if isinstance(content, list) else []


def _calls(turn: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the functions {name, arguments} that a turn calls."""
    calls = turn.get("tool_calls")
    for call in calls if isinstance(calls, list) else []:
        if isinstance(call, dict):
            inner = call.get("function")
            yield inner if isinstance(inner, dict) else call


def _forms(given: Conversation) -> Iterator[Conversation]:
    """Yield the conversation as given, then with every content as text (an absent one is empty), then as parts."""
    yield given
    if not all(isinstance(turn.get("content"), str) for turn in given):
        yield as_text(given)
    if any(isinstance(turn.get("content"), str) for turn in given):
        yield given.with_turns(
            {**turn, "content": [{"type": "text", "text": turn["content"]}]}
            if isinstance(turn.get("content"), str)
            else turn
            for turn in given
        )


def _joined(content: Any) -> str:
    if isinstance(content, list):
        return "".join(part["text"] for part in content)
    return content or ""


def failed(field: str, error: TemplateError, turns: Sequence[Mapping[str, Any]], where: str) -> DataError:
    """Return the error of a template that refused `turns`, with the row, its roles, and the template's own reason."""
    got = f"{where}{': ' * bool(where)}{in_words(turns, error)}"
    fix = "Give prompts as text, or use a model whose tokenizer has a chat template for such turns."
    return DataError(field, got, "one that the chat template renders", fix)


def in_words(turns: Sequence[Mapping[str, Any]], error: TemplateError) -> str:
    """Return a conversation that a template refused in words: the roles in their order, and the reason."""
    roles = [str(turn.get("role")) for turn in turns]
    some = ", ".join(roles[:ROLES]) + ", …" * (len(roles) > ROLES)
    return f"a conversation of the roles {some} ({error})"


def _lost(field: str, piece: Piece, role: str, where: str) -> DataError:
    got = f"{where}{': ' * bool(where)}turn {piece.turn + 1} (role {role!r}): the chat template drops {piece.what}"
    got = f"{got} {piece.text!r:.80}"
    fix = (
        "It does not know this role, or not at this place: give the turn a role that it shows, or join it with another"
    )
    fix = f"{fix} turn (skip_bad_rows: true leaves such rows out)."
    return DataError(field, got, "every turn's text in what the template renders", fix)
