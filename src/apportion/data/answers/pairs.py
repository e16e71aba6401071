"""Preference pairs in rows of a table: two answers to one prompt, or a ranking of several."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from apportion.data.answers.demonstrations import (
    ASSISTANT,
    Demonstration,
    answered,
    cell,
    check_kinds,
    require_column,
)
from apportion.data.answers.rankings_to_pairs import Which, pairs_of_rankings
from apportion.data.bad_rows import ColumnError
from apportion.data.formats import Row
from apportion.data.formats.rows import listed
from apportion.data.label_rows import PAIR, holds
from apportion.data.prompts import common_beginning
from apportion.errors import DataError

RANKING = ("completions", "ranks")
NAMED = "columns 'chosen' and 'rejected', or 'completions' and 'ranks', with or without 'prompt'"


class Pair(NamedTuple):
    """The better and the worse answer to one prompt, which both begin with."""

    chosen: Demonstration
    rejected: Demonstration


class PairReader:
    """Makes the preference pairs of each row of a table: one of a pair, several of a ranking.

    The first row decides whether the table holds pairs or rankings.

    Args:
        field: the configuration key that gave the table, for error messages.
        prompt_column: name of the column with the prompt; None for "prompt", where there is one.
        which: the pairs of a ranking (`rankings_to_pairs`).

    Attributes:
        unpaired: rankings without a pair so far: of one completion, all ties, or nothing judged.
    """

    def __init__(self, field: str, prompt_column: str | None = None, which: Which = "all") -> None:
        self.field, self.prompt_column, self.which = field, prompt_column, which
        self.form: tuple[str, ...] | None = None
        self.unpaired = 0

    def __call__(self, row: Row) -> list[Pair]:
        """Return the pairs of `row`.

        Raises:
            ColumnError: neither pairs nor rankings.
            DataError: an absent, empty or unsuitable value, answers to two prompts, a conversation that does not end
                with an answer, ranks that are none; with its row.
        """
        self.form = self.form or self._form(row)
        return self._ranking(row) if self.form == RANKING else [self._pair(row)]

    def _form(self, row: Row) -> tuple[str, ...]:
        form = next((form for form in (PAIR, RANKING) if any(name in row for name in form)), None)
        if form is None:
            raise ColumnError(self.field, listed(row, row.where), NAMED, "Rename the columns, or name other data.")
        return form

    def _prompt(self, row: Row) -> str | None:
        return self.prompt_column or ("prompt" if "prompt" in row else None)

    def _pair(self, row: Row) -> Pair:
        column = self._prompt(row)
        for name in (*PAIR, *([column] if column else [])):
            require_column(row, name, self.field, "prompt")
        chosen, rejected = (cell(row, name, self.field) for name in PAIR)
        prompt = None if column is None else cell(row, column, self.field)
        if isinstance(prompt, str) and not isinstance(chosen, str) and holds(chosen, prompt):
            prompt = None  # the conversations are whole: they begin with the prompt
        if prompt is None:
            return self._implicit(row, chosen, rejected)
        check_kinds(row, (str(column), *PAIR), (prompt, chosen, rejected), self.field)
        both = zip(PAIR, (chosen, rejected), strict=True)
        return Pair(*(self._answer(row, (str(column), name), prompt, answer) for name, answer in both))

    def _answer(self, row: Row, columns: Sequence[str], prompt: Any, answer: Any) -> Demonstration:
        """Return the demonstration of `answer` behind `prompt`, texts or turns in `columns`."""
        if isinstance(prompt, str):
            return Demonstration(prompt + answer, len(prompt), row.where)
        if len(answer) != 1:
            roles = ", ".join(str(turn.get("role")) for turn in answer)
            got = f"{row.where}: {columns[-1]} of the roles {roles} behind a prompt"
            fix = "Put the turns before the answer into the prompt, the same for both answers."
            raise DataError(self.field, got, "one turn, the answer", fix)
        return answered(row, columns, (prompt, answer), self.field, len(prompt))

    def _implicit(self, row: Row, chosen: Any, rejected: Any) -> Pair:
        """Return the pair of two whole texts or conversations, whose common beginning is the prompt."""
        check_kinds(row, PAIR, (chosen, rejected), self.field)
        if isinstance(chosen, str):
            start = len(common_beginning(chosen, rejected))
            alike = bool(chosen[:start].strip())
        else:
            start = len(chosen) - 1
            alike = start > 0 and chosen[:-1] == rejected[:-1]
        if not alike:
            got = f"{row.where}: chosen = {chosen!r:.60}, rejected = {rejected!r:.60}"
            fix = "Give the prompt in a column 'prompt', or pass --skip_bad_rows: the two cannot be compared."
            raise DataError(self.field, got, "two answers to one prompt, with which both begin", fix)
        if isinstance(chosen, str):
            return Pair(Demonstration(chosen, start, row.where), Demonstration(rejected, start, row.where))
        both = zip(PAIR, (chosen, rejected), strict=True)
        return Pair(*(answered(row, (name,), (turns,), self.field, start) for name, turns in both))

    def _ranking(self, row: Row) -> list[Pair]:
        column = self._prompt(row) or "prompt"
        for name in (*RANKING, column):
            require_column(row, name, self.field, "prompt")
        completions, ranks = (row[name] for name in RANKING)
        prompt = cell(row, column, self.field)
        if not isinstance(completions, list) or not completions or not isinstance(ranks, list):
            got = f"{row.where}: completions = {completions!r:.60}, ranks = {ranks!r:.40}"
            fix = "Write both as lists of one length; in CSV there are no lists, use JSON lines."
            raise DataError(self.field, got, "a list of completions and a list of ranks", fix)
        answers = [
            cell(Row({"completion": one}, f"{row.where}: completions[{i}]"), "completion", self.field)
            for i, one in enumerate(completions)
        ]
        answers = as_turns(prompt, answers)
        check_kinds(row, (column, *(f"completions[{i}]" for i in range(len(answers)))), (prompt, *answers), self.field)
        try:
            pairs = pairs_of_rankings(prompt, answers, ranks, self.which)
        except ValueError as error:
            fix = "Write a number for each completion, 1 for the best, equal ones for ties, null for not judged."
            raise DataError(self.field, f"{row.where}: {error}", "a rank for each completion", fix) from error
        self.unpaired += not pairs
        columns = (column, "completions")
        return [
            Pair(*(self._answer(row, columns, prompt, answer) for answer in (pair.chosen, pair.rejected)))
            for pair in pairs
        ]


def as_turns(prompt: Any, answers: Sequence[Any]) -> list[Any]:
    """Return texts that all answer a conversation as turns of the assistant, and other answers as they are.

    Rankings have their completions so: `apportion sample` writes them, and people rank them.
    """
    if isinstance(prompt, str) or not all(isinstance(one, str) for one in answers):
        return list(answers)
    return [[{"role": ASSISTANT, "content": one}] for one in answers]
