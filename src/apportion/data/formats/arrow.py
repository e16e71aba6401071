"""Parquet and Arrow files (of `save_to_disk`), read a batch at a time."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from apportion.data.formats.rows import NO_CLASSES, Items, Row, Unreadable, check_columns, require_columns
from apportion.data.lines import opened
from apportion.errors import DataError

BATCH = 64  # rows in memory at a time
FILE_MAGIC = b"ARROW1"  # of an Arrow file with an index at its end; a stream has none
END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"  # without it a stream that was cut off between two batches looks whole


def read_parquet(path: Path, field: str, columns: Sequence[str] = ()) -> Items:
    """Yield the rows of a Parquet file, read a batch at a time.

    Raises:
        DataError: a file that is not Parquet or is damaged, one that repeats a column or lacks one of `columns`.
    """
    opened(path, field, unzip=False).close()
    import pyarrow.parquet  # heavy, and only this format needs it

    with _explained(path, "Parquet", field), pyarrow.parquet.ParquetFile(path) as file:
        yield from _rows(file.iter_batches(BATCH, use_threads=False), file.schema_arrow, path, field, columns)


def read_arrow(path: Path, field: str, columns: Sequence[str] = ()) -> Items:
    """Yield the rows of an Arrow file, a stream or with an index, read a batch at a time.

    Raises:
        DataError: a file that is not Arrow or is not complete, one that repeats a column or lacks one of `columns`.
    """
    with opened(path, field, unzip=False) as stream:
        head = stream.read(len(FILE_MAGIC))
        stream.seek(-min(len(END_OF_STREAM), stream.seek(0, 2)), 2)
        end = stream.read()
    if head != FILE_MAGIC and end != END_OF_STREAM:
        fix = "Write it again, or convert it to CSV or JSON lines."
        raise DataError(field, f"{path}: it does not end as an Arrow stream does", "a complete Arrow file", fix)
    import pyarrow  # heavy, and only these formats need it

    with _explained(path, "Arrow", field), pyarrow.OSFile(str(path)) as file:
        if head == FILE_MAGIC:
            indexed = pyarrow.ipc.open_file(file)
            batches: Iterable[Any] = (indexed.get_batch(i) for i in range(indexed.num_record_batches))
            yield from _rows(_parts(batches), indexed.schema, path, field, columns)
        else:
            streamed = pyarrow.ipc.open_stream(file)
            yield from _rows(_parts(streamed), streamed.schema, path, field, columns)


def _parts(batches: Iterable[Any]) -> Iterator[Any]:
    """Yield record batches in slices of `BATCH` rows."""
    for batch in batches:
        yield from (batch.slice(first, BATCH) for first in range(0, batch.num_rows, BATCH))


def _rows(batches: Iterable[Any], schema: Any, path: Path, field: str, columns: Sequence[str]) -> Items:
    check_columns(schema.names, str(path), field)
    require_columns(schema.names, str(path), columns, field)
    classes, number = class_names(schema.metadata or {}), 0
    for batch in batches:
        for values in _values(batch):
            number += 1
            where = f"{path}, row {number}"
            yield Row(values, where, classes) if isinstance(values, dict) else _unrepresentable(values, where, field)


@contextmanager
def _explained(path: Path, name: str, field: str) -> Iterator[None]:
    """Raise the errors of pyarrow for a damaged file as DataError."""
    import pyarrow

    try:
        yield
    except DataError:
        raise
    except (pyarrow.ArrowException, OSError, ValueError, MemoryError, OverflowError) as error:
        fix = "Write it again, or convert it to CSV or JSON lines."
        got = f"{path}: {' '.join(str(error).split())[:300]}"
        raise DataError(field, got, f"a complete {name} file", fix) from error


def class_names(metadata: Mapping[bytes, bytes]) -> Mapping[str, Sequence[str]]:
    """Return {column: names of its classes} from the features that the library datasets stores in a schema."""
    try:
        features = json.loads(metadata[b"huggingface"])["info"]["features"]
        found = {name: one.get("names") for name, one in features.items() if one.get("_type") == "ClassLabel"}
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError):  # another library's, or none
        return NO_CLASSES
    return {column: names for column, names in found.items() if isinstance(names, list)}


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
