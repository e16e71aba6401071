"""A verifiable rule as a reward source: a text and the columns of its prompt's row become a number."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from apportion.errors import ApportionError, DataError
from apportion.rewards.source import Batch, Columns

Row = Mapping[str, Any]


class Rule(NamedTuple):
    """A rule.

    Attributes:
        score: (texts, rows) -> a number a text, None where the rule does not apply; an error of one has its `row`.
        columns: the columns of the prompts' rows that it takes.
        check: raises DataError for a row whose columns it cannot use.
    """

    score: Callable[[Sequence[str], Sequence[Row]], list[float | None]]
    columns: frozenset[str] = frozenset()
    check: Callable[[Row], None] = lambda row: None


def each(score: Callable[[str, Row], float | None]) -> Callable[[Sequence[str], Sequence[Row]], list[float | None]]:
    """Return the `Rule.score` that scores each text by itself."""

    def all_of(texts: Sequence[str], rows: Sequence[Row]) -> list[float | None]:
        scores: list[float | None] = []
        for place, (text, row) in enumerate(zip(texts, rows, strict=True)):
            try:
                scores.append(score(text, row))
            except ApportionError as error:
                error.row = place
                raise
        return scores

    return all_of


def cell(rule: str, row: Row, column: str) -> Any:
    """Return the value in `column` of a prompt's row. Raises DataError where it is null or blank."""
    value = row.get(column)
    if value is None or (isinstance(value, str) and not value.strip()):
        fix = f"Fill it in, or remove such rows: rule {rule} compares the response with it."
        raise DataError(f"prompts, column {column!r}", value, "a value in every row", fix)
    return value


class RuleSource:
    """A rule under its name in logs; see `RewardSource`. Its own code has the time limit of user-supplied functions."""

    user_supplied, may_be_dense = True, False

    def __init__(self, name: str, rule: Rule) -> None:
        self.name, self.rule = name, rule
        self.columns = Columns(rule.columns, rule.columns)

    def __call__(self, batch: Batch) -> list[float | None]:
        """Return a number a rollout. Raises an error with the rollout that the rule fails for."""
        return self.rule.score(batch.texts, batch.rows)

    def check(self, rows: Sequence[Row]) -> None:
        """Raise DataError for the first row that the rule cannot use, each distinct one once."""
        seen: set[str] = set()
        for place, row in enumerate(rows, 1):
            key = json.dumps({name: row.get(name) for name in sorted(self.rule.columns)}, default=str, sort_keys=True)
            if key not in seen:
                seen.add(key)
                try:
                    self.rule.check(row)
                except DataError as error:
                    raise DataError(f"{error.field} of prompt {place}", error.got, error.expected, error.fix) from error
