"""The file formats of tables: CSV, JSON lines, JSON lists and Parquet, each row with the line it stands on."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from apportion.errors import DataError, message


class Row(dict[str, Any]):
    """One row of a table: column -> value, and `where` it stands ("reviews.csv, line 3") for error messages."""

    __slots__ = ("where",)

    def __init__(self, values: Mapping[str, Any] | Iterable[tuple[str, Any]], where: str) -> None:
        super().__init__(values)
        self.where = where


def read_csv(path: Path, field: str) -> list[Row]:
    """Read comma-separated values with a header line.

    Raises:
        DataError: not UTF-8, a broken quotation, a repeated column, or a row with too many or too few cells.
    """
    # Some reviews are longer than the standard limit of 131,072 characters; a C long is the most that csv accepts.
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    # strict: an unclosed quotation is an error; otherwise it would swallow the rest of the file without a word.
    reader = csv.reader(io.StringIO(_text(path, field), newline=""), strict=True)
    header: list[str] | None = None
    rows: list[Row] = []
    before = 0
    while True:
        try:
            cells = next(reader, None)
        except csv.Error as error:
            where = _lines(path, before + 1, reader.line_num)
            mend = "Close the quotation, and double the quotation marks inside it."
            raise DataError(message(field, f"{where}: {error}", "comma-separated values", mend)) from error
        if cells is None:
            return rows
        where, before = _lines(path, before + 1, reader.line_num), reader.line_num
        if not cells:  # a blank line
            continue
        if header is None:
            header = cells
            _check_columns(header, where, field)
        elif len(cells) != len(header):
            came, expected = f"{where}: {len(cells)} cells", f"{len(header)} cells, as in the header"
            raise DataError(message(field, came, expected, "Quote cells that contain commas."))
        else:
            rows.append(Row(zip(header, cells, strict=True), where))


def read_json(path: Path, field: str) -> list[Row]:
    """Read one JSON object a line; a `.json` file may also be one list of objects.

    Raises:
        DataError: not UTF-8, a line that does not parse, or one that is not an object.
    """
    text = _text(path, field)
    if path.suffix.lower() == ".json" and text.lstrip()[:1] == "[":
        return [_object(item, f"{path}, item {i}", field) for i, item in enumerate(_parse(text, path, 1, field), 1)]
    rows = []
    # Not splitlines(): U+2028 and its like may stand inside a JSON string.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            rows.append(_object(_parse(line, path, number, field), f"{path}, line {number}", field))
    return rows


def read_parquet(path: Path, field: str) -> list[Row]:
    """Read a Parquet file.

    Raises:
        DataError: a file that is not Parquet, a repeated column, or text that is not UTF-8.
    """
    import pyarrow  # heavy, and only this format needs it
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
        _check_columns(table.column_names, str(path), field)
        values = table.to_pylist()
    except UnicodeDecodeError as error:
        mend = "Write its text columns in UTF-8."
        raise DataError(message(field, f"{path}: {error}", "a Parquet file with UTF-8 text", mend)) from error
    except (pyarrow.ArrowException, OSError) as error:
        mend = "Write it again, or convert it to CSV or JSON lines."
        raise DataError(message(field, f"{path}: {error}", "a complete Parquet file", mend)) from error
    return [Row(row, f"{path}, row {i}") for i, row in enumerate(values, 1)]


READERS: dict[str, Callable[[Path, str], list[Row]]] = {
    ".csv": read_csv,
    ".jsonl": read_json,
    ".json": read_json,
    ".parquet": read_parquet,
}


def _text(path: Path, field: str) -> str:
    try:
        content = path.read_bytes()
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        # `error.start` counts from after a byte-order mark.
        offset = error.start + len(content) - len(error.object)
        line = content.count(b"\n", 0, offset) + 1
        came = f"{path}, line {line}: byte {content[offset]:#04x} at offset {offset}"
        mend = "Convert the file, for example with `iconv -f latin1 -t utf-8`."
        raise DataError(message(field, came, "text in UTF-8", mend)) from error
    except OSError as error:
        mend = "Check the path and its permissions."
        raise DataError(message(field, f"{path}: {error.strerror}", "a readable file", mend)) from error


def _parse(text: str, path: Path, line: int, field: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where = f"{path}, line {line + error.lineno - 1}, column {error.colno}"
        mend = "Write each row as one JSON object on a line of its own."
        raise DataError(message(field, f"{where}: {error.msg}", "valid JSON", mend)) from error
    except RecursionError as error:
        came = f"{path}, line {line}: nested too deeply"
        mend = "Give each column as a key of one object."
        raise DataError(message(field, came, "a flat JSON object", mend)) from error


def _object(value: Any, where: str, field: str) -> Row:
    if not isinstance(value, dict):
        came = f"{where}: {type(value).__name__} {str(value)[:60]}"
        mend = 'Write each row as an object, for example {"text": "..."}.'
        raise DataError(message(field, came, "a JSON object", mend))
    return Row(value, where)


def _lines(path: Path, first: int, last: int) -> str:
    return f"{path}, line {first}" if last <= first else f"{path}, lines {first}-{last}"


def _check_columns(names: list[str], where: str, field: str) -> None:
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        came = f"{where}: columns {', '.join(names)}"
        raise DataError(message(field, came, "each column once", f"Rename or drop one {repeated[0]!r}."))
