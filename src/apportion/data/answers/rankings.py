"""People's rankings of K completions of a prompt, from tables of rankings or of preference pairs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar, overload

from apportion.data.answers.ranking_rows import LEAVE_OUT, Ranking, of_pair, of_row
from apportion.data.assets import BUILTIN_DATA
from apportion.data.bad_rows import BadRows, ColumnError
from apportion.data.formats import Row
from apportion.data.formats.rows import listed
from apportion.data.label_rows import PAIR
from apportion.data.splits import bucket
from apportion.data.tables import first_columns, usable
from apportion.distributed import launcher
from apportion.errors import DataError
from apportion.system import stderr

T = TypeVar("T")
RANKING = ("completions", "ranks")
NAMED = "columns 'chosen' and 'rejected', or 'completions' and 'ranks', with or without 'prompt'"


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

    A row that repeats another, without saying who ranked it, and a pair of two equal texts are left out; a warning
    counts them.

    Raises:
        DataError: the errors of `read_rows` and `conversation`; fewer than two completions, equal ones, ranks that are
            absent, of another number, no numbers, or two rankings of one item by one person; each with its row.
    """
    reader = RankingReader(field)
    rows = usable(source, lambda row: [make(one) for one in reader(row)], field=field, bad=bad, split=split)
    found = [one for made in rows for one in made]
    for text in reader.left_out() if launcher.is_log_rank() else ():
        stderr.write(f"warning: {field}: {source}: {text}.\n")
    return found


class RankingReader:
    """Makes the ranking of each row, none of a row that is left out; the rows before it tell which are repeated.

    Args:
        field: the configuration key that gave the table, for error messages.
        prompt_column: name of the column with the prompt; None for "prompt", which pairs need not have.
        calls_last: whether an answer may be a tool call without text.

    Attributes:
        repeated: rows left out so far since an equal one came before.
        equal: pairs left out so far since their two texts are equal: they teach nothing.
    """

    def __init__(self, field: str, prompt_column: str | None = None, *, calls_last: bool = False) -> None:
        self.field, self.prompt_column, self.calls_last = field, prompt_column or "prompt", calls_last
        self.repeated = self.equal = 0
        self._seen: dict[tuple[str, str | None], Ranking] = {}
        self._equal: set[tuple[str, Any]] = set()
        self._known: set[str] = set()

    def __call__(self, row: Row) -> tuple[Ranking, ...]:
        """Return the ranking of `row`, or nothing.

        Raises:
            ColumnError: the first row is neither a pair nor a ranking, or has no ranks: no row of the table has.
            DataError: as `read_rankings`, with its row.
        """
        made = self._made(row)
        if made.annotator is None:
            key = (made.item, made.ranks)
            if key in self._equal:
                self.repeated += 1
                return ()
            self._equal.add(key)
        else:
            self._check_first(made)
        if made.completions[0] == made.completions[1]:  # of a pair: equal ones of more are refused
            self.equal += 1
            return ()
        return (made,)

    def left_out(self) -> list[str]:
        """Return lines that count what was left out."""
        rows = "1 row repeats" if self.repeated == 1 else f"{self.repeated} rows repeat"
        pairs = "1 pair has" if self.equal == 1 else f"{self.equal} pairs have"
        lines = {
            f"{rows} another, with the same ranks and no annotator: left out": self.repeated,
            f"{pairs} two equal texts: they teach nothing and are left out": self.equal,
        }
        return [line for line, count in lines.items() if count]

    def _made(self, row: Row) -> Ranking:
        settings: dict[str, Any] = {"field": self.field, "column": self.prompt_column, "calls_last": self.calls_last}
        present = set(row) & {*PAIR, *RANKING}
        if not present:
            self._refuse(row, present, NAMED, "Rename the columns, or name other data.")
        if "completions" not in present and present & set(PAIR):
            self._known |= present
            return of_pair(row, **settings)
        if "ranks" not in present:
            fix = "Rank the completions first (`apportion label`), or name another file."
            self._refuse(row, {"ranks"}, "a column 'ranks', 1 for the best", fix)
        self._known |= present
        return of_row(row, **settings)

    def _refuse(self, row: Row, lacking: set[str], expected: str, fix: str) -> None:
        """Raise the error of a row without columns: of all rows where none before had them."""
        known = lacking <= self._known if lacking else bool(self._known)
        raise (DataError if known else ColumnError)(self.field, listed(row, row.where), expected, fix)

    def _check_first(self, made: Ranking) -> None:
        """Raise DataError for the second ranking of an item by one person."""
        first = self._seen.setdefault((made.item, made.annotator), made)
        if first is not made:
            same = "the same" if first.ranks == made.ranks else "contradictory"
            got = f"{made.where}: a second ranking of one item by {made.annotator!r:.40}, {same} ranks; the first is "
            fix = f"Keep one of the two, {LEAVE_OUT}, which keeps the first."
            raise DataError(self.field, f"{got}{first.where}", "one ranking an item and annotator", fix)
