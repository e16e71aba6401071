"""Rule `exact`: the answer after a marker equals the one in a column."""

from __future__ import annotations

from collections.abc import Mapping
from decimal import Decimal, InvalidOperation
from typing import Any

from apportion.errors import ConfigError, check_flag
from apportion.rewards.rule import Rule, cell, each


def exact(*, marker: str = "####", column: str = "answer", numbers: bool = False) -> Rule:
    """Return 1 where what follows the last `marker` on its line is the answer in `column`, 0 otherwise.

    White space around both is ignored; a response without the marker is 0. The column's value is cut after the marker
    too where it has one, so that GSM8K's answers can stand as they are. An empty marker compares the whole response.

    Args:
        numbers: compare as numbers where both are: 1,234 is 1234.0, and a currency sign or a full stop at the end is
            ignored.

    Raises:
        ConfigError: a setting of another type.
    """
    for field, value in (("marker", marker), ("column", column)):
        if not isinstance(value, str):
            raise ConfigError(f"rewards.exact.{field}", value, "text", "Write it in quotes.")
    check_flag("rewards.exact.numbers", numbers)

    def score(text: str, row: Mapping[str, Any]) -> float:
        given, expected = after(text, marker), expected_answer(row)
        if given is None:
            return 0.0
        if numbers and (one := number(given)) is not None and (two := number(expected)) is not None:
            return float(one == two)
        return float(given == expected)

    def expected_answer(row: Mapping[str, Any]) -> str:
        value = str(cell("exact", row, column))
        found = after(value, marker) if marker else None
        return value.strip() if found is None else found

    def check(row: Mapping[str, Any]) -> None:
        expected_answer(row)

    return Rule(each(score), frozenset({column}), check)


def after(text: str, marker: str) -> str | None:
    """Return the text after the last `marker`, to the end of its line; all of it for an empty marker, None without."""
    if not marker:
        return text.strip()
    _, found, rest = text.rpartition(marker)
    if not found:
        return None
    lines = rest.strip().splitlines()
    return lines[0].strip() if lines else ""


def number(text: str) -> Decimal | None:
    """Return the number that `text` is, without separators of thousands and currency signs; None where it is none."""
    plain = text.replace(",", "").replace(" ", "").strip("$€£").removesuffix(".")
    try:
        value = Decimal(plain)
    except InvalidOperation:
        return None
    return value if value.is_finite() else None
