"""Labels of texts in the spellings of public tools: 1 is the good one, 0 the bad one."""

from __future__ import annotations

import math
from decimal import Decimal
from typing import Any

from apportion.data.bad_rows import ColumnError
from apportion.data.formats import Row
from apportion.errors import DataError

SPELLINGS = {
    **dict.fromkeys(("0", "false", "neg", "negative", "rejected"), 0),
    **dict.fromkeys(("1", "true", "pos", "positive", "chosen"), 1),
}
EXPECTED = "0, false, neg, negative or rejected; or 1, true, pos, positive or chosen"


def label_of(row: Row, column: str, field: str) -> int:
    """Return the label of `row`: 0 or 1, from a number, a truth value, a word, or the name of the row's class.

    Numbers may be written as 1, 1.0, "1" or "1.0", words in upper or lower case. Where the file stores the names of
    its classes and both are known words, these decide, whichever number each of them has.

    Raises:
        ColumnError: another number, or more classes: in another scale, 0 and 1 may mean something else.
        DataError: another word or type.
    """
    value, classes = row[column], row.classes.get(column, ())
    if classes and len(classes) != 2:
        got = f"{row.where}: {column} of {len(classes)} classes ({', '.join(map(str, classes))[:200]})"
        raise ColumnError(field, got, "two classes", "Name another column with --label_column, or write 1 and 0.")
    name = _class_name(row, column, value)
    if name in SPELLINGS:
        return SPELLINGS[name]
    number = _number(value)
    if number in (0.0, 1.0):
        return int(number)
    got = f"{row.where}: {column} = {value!r}"
    if number is not None:
        fix = "Write 1 for a good text and 0 for a bad one: in another scale, such as 1 to 5, no number means that."
        raise ColumnError(field, got, EXPECTED, fix)
    fix = "Write 1 or positive for a good text, 0 or negative for a bad one."
    raise DataError(field, got, EXPECTED, fix)


def _class_name(row: Row, column: str, value: Any) -> str | None:
    """Return a label as a word in lower case: the name of its class, where both classes have known names."""
    if isinstance(value, str):
        return value.strip().lower()
    if isinstance(value, bool):
        return str(value).lower()
    names = [str(name).strip().lower() for name in row.classes.get(column, ())]
    known = len(names) == 2 and {SPELLINGS.get(name) for name in names} == {0, 1}
    return names[value] if known and isinstance(value, int) and value in (0, 1) else None


def _number(value: Any) -> float | None:
    """Return a label as a finite number, or None."""
    if isinstance(value, bool) or not isinstance(value, int | float | Decimal | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None
