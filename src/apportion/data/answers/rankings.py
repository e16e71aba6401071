"""People's rankings of K completions of a prompt, from tables of rankings or of preference pairs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar, overload

from apportion.data.answers.item_id import canonical_json, item_id
from apportion.data.assets import BUILTIN_DATA
from apportion.data.bad_rows import BadRows, ColumnError
from apportion.data.conversations import Conversation, conversation, from_cell
from apportion.data.formats import Row
from apportion.data.formats.rows import listed
from apportion.data.label_rows import PAIR
from apportion.data.prompts import common_beginning
from apportion.data.splits import bucket
from apportion.data.tables import check_text, first_columns, require, usable
from apportion.distributed import launcher
from apportion.errors import DataError
from apportion.system import stderr

T = TypeVar("T")
Text = str | Conversation  # a text, or turns
COLUMNS = ("prompt", "completions", "ranks")
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


def split_by_prompt(rankings: Sequence[T], key: Callable[[T], str]) -> tuple[list[T], list[T]]:
    """Return (training, held-out) rankings: a fixed tenth of their prompts is held out, by hash."""
    buckets = [(one, bucket(key(one))) for one in rankings]
    return [one for one, number in buckets if number >= 10], [one for one, number in buckets if number < 10]


def kind_of(source: str, *, field: str = "data", split: str | None = None, label: str = "label") -> str:
    """Return what the first readable row of `source` is: "rankings", "pairs" or "other".

    Args:
        label: the column whose presence makes a row of chosen and rejected a labelled text.

    Raises:
        DataError: as `read_rows`.
    """
    columns = [] if source in BUILTIN_DATA else first_columns(source, field=field, split=split)
    if "completions" in columns:
        return "rankings"
    return "pairs" if set(columns) >= set(PAIR) and label not in columns else "other"


@overload
def read_rankings(
    source: str, *, field: str = "data", bad: BadRows | None = None, split: str | None = None
) -> list[Ranking]: ...
@overload
def read_rankings(
    source: str,
    *,
    field: str = "data",
    bad: BadRows | None = None,
    split: str | None = None,
    make: Callable[[Ranking], T],
) -> list[T]: ...
def read_rankings(source, *, field="data", bad=None, split=None, make=lambda ranking: ranking):  # type: ignore[no-untyped-def]
    """Return the rankings of `source`, in the order of the file.

    Args:
        source: anything that `read_rows` takes with lists in its cells (JSON lines, Parquet, Arrow, a folder of them, a
            hub id) with the columns prompt, completions and ranks; or preference pairs (chosen, rejected), which are
            rankings of two, with their margin in an optional column `margin`.
        field: the configuration key that gave `source`, for error messages.
        bad: the log of invalid rows; None makes the first of them an error.
        make: makes something else of each ranking; a DataError that it raises makes the row invalid.

    A row that repeats another, without saying who ranked it, is left out, and a warning counts such rows.

    Raises:
        DataError: the errors of `read_rows` and `conversation`; fewer than two completions, equal ones, ranks that are
            absent, of another number, no numbers, or two rankings of one item by one person; each with its row.
    """
    reader = _Reader(field)
    rows = usable(source, lambda row: [make(one) for one in reader(row)], field=field, bad=bad, split=split)
    found = [one for made in rows for one in made]
    if reader.repeated and launcher.is_log_rank():
        counted = "1 row repeats" if reader.repeated == 1 else f"{reader.repeated} rows repeat"
        text = f"{counted} another, with the same ranks and no annotator: left out"
        stderr.write(f"warning: {field}: {source}: {text}.\n")
    return found


class _Reader:
    """Makes the ranking of each row; the rows before it tell which are repeated.

    Attributes:
        repeated: rows left out so far since an equal one came before.
    """

    def __init__(self, field: str) -> None:
        self.field, self.repeated = field, 0
        self._seen: dict[tuple[str, str | None], Ranking] = {}
        self._equal: set[tuple[str, Any]] = set()

    def __call__(self, row: Row) -> tuple[Ranking, ...]:
        made = of_pair(row, self.field) if _is_pair(row) else of_row(row, self.field)
        if made.annotator is None:
            key = (made.item, made.ranks)
            if key in self._equal:
                self.repeated += 1
                return ()
            self._equal.add(key)
            return (made,)
        first = self._seen.setdefault((made.item, made.annotator), made)
        if first is not made:
            same = "the same" if first.ranks == made.ranks else "contradictory"
            got = f"{made.where}: a second ranking of one item by {made.annotator!r:.40}, {same} ranks; the first is "
            fix = f"Keep one of the two, {LEAVE_OUT}, which keeps the first."
            raise DataError(self.field, f"{got}{first.where}", "one ranking an item and annotator", fix)
        return (made,)


def _is_pair(row: Row) -> bool:
    return "completions" not in row and all(name in row for name in PAIR)


def of_row(row: Row, field: str = "data") -> Ranking:
    """Return the ranking in a row with K completions. Raises DataError as `read_rankings`."""
    for column in COLUMNS:
        if column == "ranks" and column not in row:
            fix = "Rank the completions first (`apportion label`), or name another file."
            raise ColumnError(field, listed(row, row.where), "a column 'ranks', 1 for the best", fix)
        require(row, column, field=field)
    prompt = _text(row, "prompt", field)
    given = _listed(row, "completions", field)
    if len(given) < 2:
        got = f"{row.where}: {len(given)} completion{'s' * (len(given) != 1)}"
        raise DataError(field, got, "two or more completions to compare", f"Remove the row, {LEAVE_OUT}.")
    completions = tuple(_completion(row, i, one, field) for i, one in enumerate(given))
    ranks = tuple(_rank(row, i, rank, field) for i, rank in enumerate(_listed(row, "ranks", field)))
    _same_count(row, "ranks", ranks, completions, field)
    _check_kinds(row, prompt, completions, field)
    _check_different(row, completions, ranks, field)
    margins = None
    if row.get("margins") is not None:
        margins = tuple(_number(row, f"margins[{i}]", m, field) for i, m in enumerate(_listed(row, "margins", field)))
        _same_count(row, "margins", margins, completions, field)
    item = _named(row, prompt, completions, field)
    return replace(Ranking(prompt, completions, ranks, item, margins), **_details(row, len(ranks), field))


def of_pair(row: Row, field: str = "data") -> Ranking:
    """Return the ranking of two in a row of chosen and rejected, whose prompt may be what the two begin with.

    Raises:
        DataError: as `read_rankings`; the two answer different conversations, or are of different kinds.
    """
    for name in PAIR:
        require(row, name, field=field)
    chosen, rejected = (_text(row, name, field) for name in PAIR)
    given = None if row.get("prompt") is None else _text(row, "prompt", field)
    prompt: Text
    completions: tuple[Text, Text]
    if given is None and isinstance(chosen, str) and isinstance(rejected, str):
        prompt = common_beginning(chosen, rejected)
        completions = (chosen[len(prompt) :], rejected[len(prompt) :])
    elif isinstance(chosen, str) or isinstance(rejected, str):
        prompt, completions = "" if given is None else given, (chosen, rejected)
    elif isinstance(given, Conversation) and not _begins(chosen, given) and not _begins(rejected, given):
        prompt, completions = given, (chosen, rejected)
    else:
        turns = common_beginning(list(chosen), list(rejected)) if given is None or isinstance(given, str) else given
        answers = len(chosen) > len(turns) and len(rejected) > len(turns)
        if not turns or not answers or not (_begins(chosen, turns) and _begins(rejected, turns)):
            got = f"{row.where}: chosen = {chosen!r:.60}, rejected = {rejected!r:.60}"
            fix = f"Remove the row, {LEAVE_OUT}: the two cannot be compared."
            raise DataError(field, got, "two answers to one conversation", fix)
        prompt = chosen.with_turns(turns)
        completions = (chosen.with_turns(chosen[len(turns) :]), rejected.with_turns(rejected[len(turns) :]))
    _check_kinds(row, prompt, completions, field)
    _check_different(row, completions, (1.0, 2.0), field)
    margin = row.get("margin")
    margins = None if margin is None else (_number(row, "margin", margin, field), 0.0)
    item = _named(row, prompt, completions, field)
    return replace(Ranking(prompt, completions, (1.0, 2.0), item, margins), **_details(row, 2, field))


def _begins(turns: Conversation, others: Sequence[Any]) -> bool:
    return list(turns[: len(others)]) == list(others)


def _text(row: Row, column: str, field: str) -> Text:
    """Return a text or a conversation in `column`."""
    value = from_cell(row, column, field)
    if isinstance(value, list) and value:
        return conversation([(column, value)], row, field)
    return check_text(row, column, field=field)


def _completion(row: Row, number: int, value: Any, field: str) -> Text:
    """Return a completion: a text, which may be empty, or the turns behind the prompt."""
    name = f"completions[{number}]"
    if isinstance(value, list) and value:
        return conversation([(name, value)], Row({name: value}, row.where), field)
    return value if value == "" else check_text(Row({name: value}, row.where), name, field=field)


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


def _check_kinds(row: Row, prompt: Text, completions: Sequence[Text], field: str) -> None:
    """Raise DataError for completions of two kinds, turns behind a text, and a prompt that ends with an answer."""
    kinds = sorted({"text" if isinstance(one, str) else "messages" for one in completions})
    if len(kinds) > 1 or (isinstance(prompt, str) and kinds == ["messages"]):
        before = "text" if isinstance(prompt, str) else "messages"
        got = f"{row.where}: prompt = {before}, completions = {' and '.join(kinds)}"
        raise DataError(field, got, "a prompt and completions that go together", "Write all as text, or as messages.")
    if not isinstance(prompt, str) and prompt[-1]["role"] == "assistant":
        got = f"{row.where}: the last turn of the prompt is the assistant's"
        raise DataError(field, got, "a prompt that ends before the answers", f"Move that turn, {LEAVE_OUT}.")


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
