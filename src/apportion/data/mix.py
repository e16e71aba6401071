"""Texts to keep predicting while a policy learns from rewards: the pretraining or demonstration mix of PPO-ptx."""

from __future__ import annotations

from dataclasses import dataclass

from apportion.data.bad_rows import BadRows
from apportion.data.conversations import Conversation, conversation, from_cell
from apportion.data.formats import Row
from apportion.data.tables import check_text, usable
from apportion.errors import DataError

COLUMNS = ("messages", "prompt", "text")  # the first that the table has is used; prompt with completion


@dataclass(frozen=True)
class Example:
    """One text of the mix.

    Attributes:
        prompt: the part that is read and not learned, None where all is learned; a conversation's turns before the
            last one of the assistant. completion: the part that is learned. where: file and line.
    """

    prompt: str | Conversation | None
    completion: str
    where: str = ""


def read_mix(source: str, *, field: str, bad: BadRows | None = None, split: str | None = None) -> list[Example]:
    """Return the rows of a table with text, with prompt and completion (text or messages each), or with messages.

    Args:
        source, split: as `read_rows` takes them. field: the setting that gave `source`. bad: as `read_rows` takes it.

    Raises:
        DataError: as `read_rows`; a row without such columns, or messages that do not end with the assistant's text.
    """
    found = ""

    def example(row: Row) -> Example:
        nonlocal found
        found = found or next((name for name in COLUMNS if name in row), COLUMNS[-1])
        if found == "text":
            return Example(None, check_text(row, "text", field=field), row.where)
        if found == "messages":
            return _dialogue(row, [("messages", from_cell(row, "messages", field))], field)
        prompt, completion = (from_cell(row, name, field) if name in row else None for name in ("prompt", "completion"))
        if isinstance(prompt, list) and isinstance(completion, list):
            return _dialogue(row, [("prompt", prompt), ("completion", completion)], field)
        texts = [check_text(row, name, field=field) for name in ("prompt", "completion")]
        return Example(texts[0], texts[1], row.where)

    return list(usable(source, example, field=field, bad=bad, split=split))


def _dialogue(row: Row, parts: list[tuple[str, object]], field: str) -> Example:
    """Return a conversation's last turn, the assistant's, and the turns before it."""
    for column, turns in parts:
        if not isinstance(turns, list) or not turns:
            fix = 'Write [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}].'
            raise DataError(field, f"{row.where}: {column} = {turns!r:.60}", "a list of messages", fix)
    turns = conversation([(column, turns) for column, turns in parts if isinstance(turns, list)], row, field)
    last = turns[-1]
    if len(turns) < 2 or last["role"] != "assistant" or not isinstance(last.get("content"), str):
        got = f"{row.where}: {len(turns)} turns, the last of {last['role']!r}"
        fix = "End each conversation with the answer to learn, or leave such rows out with skip_bad_rows."
        raise DataError(field, got, "turns that end with a text of the assistant", fix)
    return Example(turns.with_turns(turns[:-1]), last["content"], row.where)
