"""File formats of tables: CSV, JSON lines, JSON lists and Parquet, read a row at a time with its location."""

from __future__ import annotations

import csv
import difflib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from apportion.data.lines import MAX_ROW_BYTES, CsvFeed, Line, lines, not_utf8, opened, too_long
from apportion.errors import DataError

MAX_DEPTH = 64  # nested values of a JSON row
MAX_LIST_BYTES = 2**29  # of a JSON list, which is read at once
BATCH = 64  # rows of a Parquet file in memory at a time


class Row(dict[str, Any]):
    """One row of a table: column -> value, and its location `where` ("reviews.csv, line 3") for error messages."""

    __slots__ = ("where",)

    def __init__(self, values: Mapping[str, Any] | Iterable[tuple[str, Any]], where: str) -> None:
        super().__init__(values)
        self.where = where


class Unreadable(NamedTuple):
    """An unreadable row between readable ones: its location, the error, and its text."""

    where: str
    error: DataError
    text: str


Items = Iterator[Row | Unreadable]


def read_csv(path: Path, field: str, columns: Sequence[str] = ()) -> Items:
    """Yield the rows of comma-separated values with a header line.

    Raises:
        DataError: a header that is not UTF-8, repeats a column or lacks one of `columns`; a broken quotation, after
            which no row boundary is certain.
    """
    # the default limit, 131,072 characters, is too small for some reviews
    csv.field_size_limit(MAX_ROW_BYTES)
    with opened(path, field) as stream:
        feed = CsvFeed(stream, path, field)
        # strict: an unclosed quotation is an error; otherwise it would silently swallow the rest of the file
        reader = csv.reader(feed, strict=True)
        header: list[str] | None = None
        while (record := _record(reader, feed)) is not None:
            where, cells = record
            if not cells:  # a blank line
                continue
            if header is None:
                if feed.wrong:
                    raise feed.wrong
                header = cells
                check_columns(header, where, field)
                require_columns(header, str(path), columns, field)
            elif feed.wrong:
                yield Unreadable(where, feed.wrong, feed.text)
            elif len(cells) != len(header):
                got, expected = f"{where}: {len(cells)} cells", f"{len(header)} cells, as in the header"
                error = DataError(field, got, expected, "Quote cells that contain commas.")
                yield Unreadable(where, error, feed.text)
            else:
                yield Row(zip(header, cells, strict=True), where)


def _record(reader: Any, feed: CsvFeed) -> tuple[str, list[str]] | None:
    """Return (where, cells) of the next row, None at the end. Raises DataError for a broken quotation."""
    feed.begin()
    before = reader.line_num
    try:
        cells = next(reader, None)
    except csv.Error as error:
        if feed.wrong:
            raise feed.wrong from error
        where = _lines(feed.path, before + 1, reader.line_num)
        fix = "Close the quotation, and double the quotation marks inside it."
        raise DataError(feed.field, f"{where}: {error}", "comma-separated values", fix) from error
    return None if cells is None else (_lines(feed.path, before + 1, reader.line_num), cells)


def read_json(path: Path, field: str, columns: Sequence[str] = ()) -> Items:
    """Yield one JSON object a line; a `.json` file may also be one list of objects, which is read at once.

    Raises:
        DataError: a list that does not parse.
    """
    with opened(path, field) as stream:
        if path.suffix.lower() == ".json" and stream.peek(4096).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"[":  # type: ignore[attr-defined]
            yield from _list(stream.read(MAX_LIST_BYTES + 1), path, field)
            return
        for line in lines(stream):
            where = f"{path}, line {line.number}"
            if not line.raw.strip():
                continue
            try:
                if line.wrong:
                    raise too_long(where, line.wrong, field)
                yield _object(_parse(_decoded(line, path, field), path, line.number, field), where, field)
            except DataError as error:
                yield Unreadable(where, error, line.raw.decode("utf-8", "backslashreplace"))


def _list(content: bytes, path: Path, field: str) -> Items:
    if len(content) > MAX_LIST_BYTES:
        fix = "Write one object a line (.jsonl), which is read line by line."
        raise DataError(field, f"{path}: a list of more than {MAX_LIST_BYTES} bytes", "a shorter list", fix)
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        offset = error.start + len(content) - len(error.object)  # `start` counts from after a byte-order mark
        begin = content.rfind(b"\n", 0, offset) + 1
        line = Line(content.count(b"\n", 0, offset) + 1, content[begin:], begin)
        raise not_utf8(path, line, offset - begin, field) from error
    for number, item in enumerate(_parse(text, path, 0, field, MAX_DEPTH + 1), 1):
        where = f"{path}, item {number}"
        try:
            yield _object(item, where, field)
        except DataError as error:
            yield Unreadable(where, error, json.dumps(item))


def read_parquet(path: Path, field: str, columns: Sequence[str] = ()) -> Items:
    """Yield the rows of a Parquet file, read a batch at a time.

    Raises:
        DataError: a file that is not Parquet or is damaged, one that repeats a column or lacks one of `columns`.
    """
    opened(path, field).close()
    import pyarrow  # heavy, and only this format needs it
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            check_columns(names, str(path), field)
            require_columns(names, str(path), columns, field)
            for batch in file.iter_batches(BATCH, use_threads=False):
                for values in _values(batch):
                    number += 1
                    where = f"{path}, row {number}"
                    yield Row(values, where) if isinstance(values, dict) else _unrepresentable(values, where, field)
    except DataError:
        raise
    except (pyarrow.ArrowException, OSError, ValueError, MemoryError, OverflowError) as error:
        fix = "Write it again, or convert it to CSV or JSON lines."
        got = f"{path}: {' '.join(str(error).split())[:300]}"
        raise DataError(field, got, "a complete Parquet file", fix) from error


def _values(batch: Any) -> Iterator[dict[str, Any] | Exception]:
    """Yield the rows of a record batch as dicts, or the exception for a row that Python cannot represent."""
    try:
        yield from batch.to_pylist()
        return
    except (ValueError, OverflowError):  # text that is not UTF-8, a date after the year 9999: find the rows
        pass
    for i in range(batch.num_rows):
        try:
            yield batch.slice(i, 1).to_pylist()[0]
        except (ValueError, OverflowError) as error:
            yield error


def _unrepresentable(reason: Exception, where: str, field: str) -> Unreadable:
    fix = "Write its text columns in UTF-8, and dates between the years 1 and 9999."
    error = DataError(field, f"{where}: {reason}", "values that Python can represent", fix)
    return Unreadable(where, error, "")


READERS: dict[str, Callable[[Path, str, Sequence[str]], Items]] = {
    ".csv": read_csv,
    ".jsonl": read_json,
    ".json": read_json,
    ".parquet": read_parquet,
}


def _decoded(line: Line, path: Path, field: str) -> str:
    try:
        return line.raw.rstrip(b"\r\n").decode("utf-8")
    except UnicodeDecodeError as error:
        raise not_utf8(path, line, error.start, field) from error


class _Rejected(ValueError):
    """A value that is valid in JSON and not in a table, or the reverse."""


def _parse(text: str, path: Path, line: int, field: str, deepest: int = MAX_DEPTH) -> Any:
    """Return the JSON value of line number `line`; 0 stands for a whole file."""
    where = f"{path}, line {line}" if line else str(path)
    fix = "Write each row as one JSON object on a line of its own."
    try:
        value = _DECODER.decode(text)
        # only a row with many brackets can be deep
        deep = text.count("[") + text.count("{") > deepest and depth(value) > deepest
    except json.JSONDecodeError as error:
        where = f"{path}, line {max(line, 1) + error.lineno - 1}, column {error.colno}"
        raise DataError(field, f"{where}: {error.msg}", "valid JSON", fix) from error
    except RecursionError:
        deep = True
    except ValueError as error:  # _Rejected, or an integer with more digits than Python parses
        raise DataError(field, f"{where}: {error}", "valid JSON, each key once", fix) from error
    if deep:
        fix = "Give each column as a key of one object."
        raise DataError(field, f"{where}: nested too deeply", "a flat JSON object", fix)
    return value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = dict(pairs)
    if len(unique) < len(pairs):
        names = [name for name, _ in pairs]
        raise _Rejected(f"the key {next(name for name in names if names.count(name) > 1)[:60]!r} twice in one object")
    return unique


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise _Rejected(f"the number {text[:20]}, which is not finite")
    return value


_DECODER = json.JSONDecoder(object_pairs_hook=_once, parse_float=_finite, parse_constant=_finite)


def depth(value: Any) -> int:
    """Return the nesting depth of lists and objects, without recursion."""
    levels, layer = 0, [value]
    while layer := [item for item in layer if isinstance(item, (list, dict))]:
        levels += 1
        layer = [inner for item in layer for inner in (item.values() if isinstance(item, dict) else item)]
    return levels


def _object(value: Any, where: str, field: str) -> Row:
    if not isinstance(value, dict):
        got = f"{where}: {type(value).__name__} {str(value)[:60]}"
        fix = 'Write each row as an object, for example {"text": "..."}.'
        raise DataError(field, got, "a JSON object", fix)
    return Row(value, where)


def _lines(path: Path, first: int, last: int) -> str:
    return f"{path}, line {first}" if last <= first else f"{path}, lines {first}-{last}"


def check_columns(names: Sequence[str], where: str, field: str) -> None:
    """Raise DataError for a table with a duplicate column."""
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        got = f"{where}: columns {', '.join(names)[:300]}"
        raise DataError(field, got, "each column once", f"Rename or drop one {repeated[0]!r}.")


def require_columns(present: Iterable[str], where: str, columns: Sequence[str], field: str) -> None:
    """Raise DataError for a table without one of `columns`, with the most similar name."""
    names = list(present)
    for column in columns:
        if column in names:
            continue
        by_lower = {name.lower(): name for name in names}
        near = difflib.get_close_matches(column.lower(), by_lower, n=1, cutoff=0.6)
        hint = f"Did you mean {by_lower[near[0]]!r}? Rename it" if near else "Rename or add it"
        got = f"{where}: columns {', '.join(names)[:300] or '(none)'}"
        raise DataError(field, got, f"a column {column!r}", f"{hint}.")
