"""JSON lines and JSON lists of objects, read a row at a time."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from apportion.data.formats.rows import Items, Row, Unreadable
from apportion.data.lines import Line, kind_of, lines, not_utf8, opened, too_long
from apportion.errors import DataError

MAX_DEPTH = 64  # nested values of a JSON row
MAX_LIST_BYTES = 2**29  # of a JSON list, which is read at once


def read_json(path: Path, field: str, columns: Sequence[str] = ()) -> Items:
    """Yield one JSON object a line; a `.json` file may also be one list of objects, which is read at once.

    Raises:
        DataError: a list that does not parse.
    """
    with opened(path, field) as stream:
        if kind_of(path) == ".json" and stream.peek(4096).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"[":  # type: ignore[attr-defined]
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
