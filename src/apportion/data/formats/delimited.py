"""Comma-separated and tab-separated values with a header line, read a row at a time."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from apportion.data.formats.rows import Items, Row, Unreadable, check_columns, require_columns
from apportion.data.lines import MAX_ROW_BYTES, CsvFeed, opened
from apportion.errors import DataError

SEPARATORS = {",": "comma", "\t": "tab"}


def read_csv(path: Path, field: str, columns: Sequence[str] = (), separator: str = ",") -> Items:
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
        reader = csv.reader(feed, strict=True, delimiter=separator)
        header: list[str] | None = None
        while (record := _record(reader, feed, separator)) is not None:
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
                fix = f"Quote cells that contain {SEPARATORS[separator]}s."
                yield Unreadable(where, DataError(field, got, expected, fix), feed.text)
            else:
                yield Row(zip(header, cells, strict=True), where)


def read_tsv(path: Path, field: str, columns: Sequence[str] = ()) -> Items:
    """Yield the rows of tab-separated values with a header line; otherwise as `read_csv`, quotations included."""
    return read_csv(path, field, columns, "\t")


def _record(reader: Any, feed: CsvFeed, separator: str) -> tuple[str, list[str]] | None:
    """Return (where, cells) of the next row, None at the end. Raises DataError for a broken quotation."""
    feed.begin()
    before = reader.line_num
    try:
        cells = next(reader, None)
    except csv.Error as error:
        if feed.wrong:
            raise feed.wrong from error
        where = _lines(feed.path, before + 1, reader.line_num)
        expected = f"{SEPARATORS[separator]}-separated values"
        fix = "Close the quotation, and double the quotation marks inside it."
        raise DataError(feed.field, f"{where}: {error}", expected, fix) from error
    return None if cells is None else (_lines(feed.path, before + 1, reader.line_num), cells)


def _lines(path: Path, first: int, last: int) -> str:
    return f"{path}, line {first}" if last <= first else f"{path}, lines {first}-{last}"
