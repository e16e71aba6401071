"""The ranking in a row of a table: of K completions, or of the two answers of a preference pair."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from apportion.data.answers.item_id import canonical_json, item_id
from apportion.data.conversations import Conversation, conversation, from_cell
from apportion.data.formats import Row
from apportion.data.label_rows import PAIR, holds
from apportion.data.prompts import common_beginning
from apportion.data.tables import check_text, require
from apportion.errors import DataError

Text = str | Conversation  # a text, or turns
ASSISTANT = "assistant"
LEAVE_OUT = "or leave such rows out with skip_bad_rows: true"


@dataclass(frozen=True)
class Ranking:
    """One person's ranking of the completions of a prompt.

    Attributes:
        prompt: a text or a conversation. completions: K of them, each a text or the turns behind the prompt.
        ranks: K, 1 (or the lowest) is best, equal ones are ties, None is "cannot judge".
        item: the SHA-256 of prompt and completions, or the id that the row gives.
        margins: K values, or None; the margin of a pair is the winner's less the loser's.
        annotator, seconds, shown, source: who ranked it, how long it took, the order in which the completions were
            shown, and where the row is from; None where the row does not say.
        where: its file and line.
    """

    prompt: Text
    completions: tuple[Text, ...]
    ranks: tuple[float | None, ...]
    item: str
    margins: tuple[float, ...] | None = None
    annotator: str | None = None
    seconds: float | None = None
    shown: tuple[int, ...] | None = None
    source: str | None = None
    where: str = ""

    @property
    def pairs(self) -> int:
        """The number of pairs of different ranks."""
        judged = [rank for rank in self.ranks if rank is not None]
        return sum(a != b for i, a in enumerate(judged) for b in judged[:i])

    @property
    def key(self) -> str:
        """What names the prompt, for splits and clusters; without a prompt the first completion."""
        whole = self.prompt if isinstance(self.prompt, str) else canonical_json(self.prompt)
        return whole if whole.strip() else canonical_json(self.completions[0])


def of_row(row: Row, field: str = "data", column: str = "prompt", *, calls_last: bool = False) -> Ranking:
    """Return the ranking in a row with K completions.

    Args:
        column: the prompt's. calls_last: whether an answer may be a tool call without text.

    Raises:
        DataError: as `read_rankings`.
    """
    for name in (column, "completions", "ranks"):
        require(row, name, field=field)
    prompt = _text(row, column, field)
    given = _listed(row, "completions", field)
    if len(given) < 2:
        got = f"{row.where}: {len(given)} completion{'s' * (len(given) != 1)}"
        raise DataError(field, got, "two or more completions to compare", f"Remove the row, {LEAVE_OUT}.")
    completions = tuple(_completion(row, i, one, field, calls_last) for i, one in enumerate(given))
    ranks = tuple(_rank(row, i, rank, field) for i, rank in enumerate(_listed(row, "ranks", field)))
    _same_count(row, "ranks", ranks, completions, field)
    _check_kinds(row, column, prompt, completions, field)
    for i, one in enumerate(completions):
        check_end(row, f"completions[{i}]", one, field)
    _check_different(row, completions, ranks, field)
    margins = None
    if row.get("margins") is not None:
        margins = tuple(_number(row, f"margins[{i}]", m, field) for i, m in enumerate(_listed(row, "margins", field)))
        _same_count(row, "margins", margins, completions, field)
    item = _named(row, prompt, completions, field)
    return replace(Ranking(prompt, completions, ranks, item, margins), **_details(row, len(ranks), field))


def of_pair(row: Row, field: str = "data", column: str = "prompt", *, calls_last: bool = False) -> Ranking:
    """Return the ranking of two in a row of chosen and rejected, whose prompt may be what the two begin with.

    The two may be equal.

    Args:
        column: the prompt's; it may be absent where it is "prompt". calls_last: as `of_row` takes it.

    Raises:
        DataError: as `read_rankings`; the two answer different conversations, or are of different kinds.
    """
    given = _text(row, column, field) if column in row or column != "prompt" else None
    chosen, rejected = (_answer(row, name, field, given is not None, calls_last) for name in PAIR)
    for name, answer in zip(PAIR, (chosen, rejected), strict=True):
        check_end(row, name, answer, field)
    whole = isinstance(given, str) and isinstance(chosen, Conversation) and holds(chosen, given)
    prompt, completions = _split(row, None if whole else given, chosen, rejected, column, field)
    margin = row.get("margin")
    margins = None if margin is None else (_number(row, "margin", margin, field), 0.0)
    item = _named(row, prompt, completions, field)
    return replace(Ranking(prompt, completions, (1.0, 2.0), item, margins), **_details(row, 2, field))


def _split(
    row: Row, given: Text | None, chosen: Text, rejected: Text, column: str, field: str
) -> tuple[Text, tuple[Text, Text]]:
    """Return (the prompt, the two answers behind it) of a pair; without a prompt `given` the two begin with it."""
    if given is None and isinstance(chosen, str) and isinstance(rejected, str):
        prompt = common_beginning(chosen, rejected)
        return prompt, (chosen[len(prompt) :], rejected[len(prompt) :])
    apart = isinstance(given, Conversation) and not _begins(chosen, given) and not _begins(rejected, given)
    if given is not None and (isinstance(given, str) or isinstance(chosen, str) or isinstance(rejected, str) or apart):
        _check_kinds(row, column, given, (chosen, rejected), field)
        return given, (chosen, rejected)
    turns: Sequence[Any] = common_beginning(list(chosen), list(rejected)) if given is None else given
    alike = turns and len(chosen) > len(turns) < len(rejected) and _begins(chosen, turns) and _begins(rejected, turns)
    if not alike or not isinstance(chosen, Conversation) or not isinstance(rejected, Conversation):
        got = f"{row.where}: chosen = {chosen!r:.60}, rejected = {rejected!r:.60}"
        fix = f"Remove the row, {LEAVE_OUT}: the two cannot be compared."
        raise DataError(field, got, "two answers to one conversation", fix)
    answers = [one.with_turns(one[len(turns) :]) for one in (chosen, rejected)]
    before = chosen.with_turns(turns)
    _check_kinds(row, column, before, answers, field)
    return before, (answers[0], answers[1])


def check_end(row: Row, name: str, answer: Text, field: str) -> None:
    """Raise DataError for turns in column `name` that do not end with an answer."""
    if isinstance(answer, Conversation) and answer[-1]["role"] != ASSISTANT:
        got = f"{row.where}: {name} ends with a turn of role {answer[-1]['role']!r}: {answer[-1]!r:.80}"
        fix = f"End it with the assistant's answer, {LEAVE_OUT}."
        raise DataError(field, got, "a conversation that ends with an answer", fix)


def _begins(turns: Text, others: Sequence[Any]) -> bool:
    return list(turns[: len(others)]) == list(others)


def _text(row: Row, column: str, field: str, calls_last: bool = False) -> Text:
    """Return a text or a conversation in `column`."""
    require(row, column, field=field)
    value = from_cell(row, column, field)
    if isinstance(value, list) and any(isinstance(one, dict) for one in value):
        return conversation([(column, value)], row, field, calls_last=calls_last)
    return check_text(row, column, field=field)


def _answer(row: Row, column: str, field: str, alone: bool, calls_last: bool) -> Text:
    """Return an answer; one that is `alone`, behind a prompt, may be blank: a model may end at once."""
    value = row.get(column)
    if alone and isinstance(value, str) and not value.strip():
        return value
    return _text(row, column, field, calls_last)


def _completion(row: Row, number: int, value: Any, field: str, calls_last: bool) -> Text:
    """Return a completion: a text, or the turns behind the prompt."""
    name = f"completions[{number}]"
    if isinstance(value, list) and any(isinstance(one, dict) for one in value):
        return conversation([(name, value)], Row({name: value}, row.where), field, calls_last=calls_last)
    blank = isinstance(value, str) and not value.strip()  # a model may end at once
    return value if blank else check_text(Row({name: value}, row.where), name, field=field)


def _listed(row: Row, column: str, field: str) -> list[Any]:
    """Return the list in `column`."""
    value = row[column]
    if not isinstance(value, list | tuple):
        got = f"{row.where}: {column} = {value!r:.60} ({type(value).__name__})"
        fix = "Write a list, in JSON lines, Parquet or Arrow: cells of CSV hold none."
        raise DataError(field, got, f"a list in column {column!r}, an entry a completion", fix)
    return list(value)


def _rank(row: Row, number: int, value: Any, field: str) -> float | None:
    if value is None or (isinstance(value, float) and math.isnan(value)):  # Parquet has either for "no value"
        return None
    return _number(row, f"ranks[{number}]", value, field, "a number, 1 for the best, or null for 'cannot judge'")


def _number(row: Row, name: str, value: Any, field: str, expected: str = "a finite number") -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        got = f"{row.where}: {name} = {value!r:.40} ({type(value).__name__})"
        raise DataError(field, got, expected, f"Write it as a number without quotes, {LEAVE_OUT}.")
    return float(value)


def _same_count(row: Row, column: str, values: Sequence[Any], completions: Sequence[Any], field: str) -> None:
    if len(values) != len(completions):
        got = f"{row.where}: {len(values)} {column} of {len(completions)} completions"
        fix = "Write null for a completion that could not be judged." if column == "ranks" else "Write 0 for none."
        raise DataError(field, got, "one an entry of completions", fix)


def _check_kinds(row: Row, column: str, prompt: Text, completions: Sequence[Text], field: str) -> None:
    """Raise DataError for completions of two kinds, turns behind a text, and a prompt that ends with an answer."""
    kinds = sorted({_kind(one) for one in completions})
    if len(kinds) > 1 or (isinstance(prompt, str) and kinds == ["messages"]):
        got = f"{row.where}: {column} = {_kind(prompt)}, answers = {' and '.join(kinds)}"
        raise DataError(field, got, "a prompt and answers that go together", "Write all as text, or as messages.")
    if not isinstance(prompt, str) and prompt[-1]["role"] == ASSISTANT:
        got = f"{row.where}: the last turn of the prompt is the assistant's"
        raise DataError(field, got, "a prompt that ends before the answers", f"Move that turn, {LEAVE_OUT}.")


def _kind(text: Text) -> str:
    return "text" if isinstance(text, str) else "messages"


def _check_different(row: Row, completions: Sequence[Text], ranks: Sequence[float | None], field: str) -> None:
    """Raise DataError for two equal completions, which no order can tell apart."""
    first: dict[str, int] = {}
    for number, one in enumerate(completions):
        other = first.setdefault(canonical_json(one), number)
        if other != number:
            a, b = ranks[other], ranks[number]
            contradictory = f", with contradictory ranks {a:g} and {b:g}" if None not in (a, b) and a != b else ""
            got = f"{row.where}: completions {other + 1} and {number + 1} are equal{contradictory}"
            raise DataError(field, got, "completions that differ", f"Keep one of the two, {LEAVE_OUT}.")


def _named(row: Row, prompt: Text, completions: Sequence[Text], field: str) -> str:
    """Return the id of an item: the row's own, else its SHA-256."""
    given = row.get("item")
    if given is None:
        return item_id(prompt, completions)
    whole = isinstance(given, int) and not isinstance(given, bool)
    return str(given) if whole else check_text(row, "item", field=field)


def _details(row: Row, count: int, field: str) -> dict[str, Any]:
    """Return the optional columns of a row of `count` completions, and its location."""
    given = {name: row[name] for name in ("annotator", "seconds", "shown", "source") if row.get(name) is not None}
    if "annotator" in given and (not isinstance(given["annotator"], int) or isinstance(given["annotator"], bool)):
        check_text(row, "annotator", field=field)
    if "seconds" in given:
        given["seconds"] = _number(row, "seconds", given["seconds"], field)
    if "shown" in given:
        order = _listed(row, "shown", field)
        whole = all(isinstance(i, int) and not isinstance(i, bool) for i in order)
        if not whole or sorted(order) not in (list(range(count)), list(range(1, count + 1))):
            got = f"{row.where}: shown = {order!r:.60}"
            fix = "Write the order in which they were shown, or leave the column out."
            raise DataError(field, got, f"the numbers of the {count} completions, each once", fix)
        given["shown"] = tuple(order)
    return {name: str(one) if name in ("annotator", "source") else one for name, one in given.items()} | {
        "where": row.where
    }
