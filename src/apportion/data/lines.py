"""Lines of a table's file: streamed, decompressed where it is gzip, each with its number and its error, if any."""

from __future__ import annotations

import gzip
import os
import re
import stat
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple, cast

from apportion.errors import DataError

MAX_ROW_BYTES = 2**24  # longer means a file without line breaks or an open quotation
_MARK = b"\xef\xbb\xbf"
_GZIP = b"\x1f\x8b"
_COMPRESSED = {
    _GZIP: "gzip",
    b"PK\x03\x04": "zip",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
}
_WIDE = {b"\xff\xfe\0\0": "utf-32", b"\0\0\xfe\xff": "utf-32", b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}
_INVALID = re.compile("[\0\udc80-\udcff]")  # a NUL, or a byte that is not UTF-8
_PHYSICAL = re.compile(r"[^\r\n]*(?:\r\n|\r|\n)|[^\r\n]+")


class Line(NamedTuple):
    """A line: its number from 1, its bytes with their line break, their offset in the file, and its error."""

    number: int
    raw: bytes
    offset: int
    wrong: str | None = None  # too long: `raw` is its start


def kind_of(path: Path) -> str:
    """Return the extension of a table's name in lower case, without the .gz behind it."""
    suffix = path.suffix.lower()
    return path.with_suffix("").suffix.lower() if suffix == ".gz" else suffix


def opened(path: Path, field: str, *, unzip: bool = True) -> BinaryIO:
    """Open a table; a gzip file, whatever its name, is decompressed as it is read.

    Args:
        unzip: whether the format is read from its start to its end; otherwise gzip is refused.

    Raises:
        DataError: it cannot be read, is not a regular file (a pipe or a device has no end), or is compressed otherwise.
    """
    try:
        # non-blocking: opening a pipe without a writer would hang
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except OSError as error:
        fix = "Check the path and its permissions."
        raise DataError(field, f"{path}: {error.strerror}", "a readable file", fix) from error
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        fix = "Write its contents to a file first; it is read more than once."
        raise DataError(field, f"{path}, which is not a regular file", "a file on disk", fix)
    stream = os.fdopen(handle, "rb")
    head = stream.read(6)
    stream.seek(0)
    kind = next((name for start, name in _COMPRESSED.items() if head.startswith(start)), None)
    if kind == "gzip" and unzip:
        return cast(BinaryIO, _Unzipped(stream, path, field))
    if kind is not None:
        stream.close()
        fix = "Decompress it first, for example with `gunzip`."
        expected = "an uncompressed table" + ", or one in gzip" * unzip
        raise DataError(field, f"{path}, compressed with {kind}", expected, fix)
    return stream


class _Unzipped(gzip.GzipFile):
    """The contents of a gzip file, of which a little is in memory at a time; damage is a DataError."""

    def __init__(self, stream: BinaryIO, path: Path, field: str) -> None:
        self._stream, self._path, self._field, self._lines = stream, path, field, 0
        super().__init__(fileobj=stream, mode="rb")

    def readline(self, size: int | None = -1) -> bytes:
        with self._damage():
            line = super().readline(size)
        self._lines += line.endswith(b"\n")
        return line

    def read(self, size: int | None = -1) -> bytes:
        with self._damage():
            return super().read(size)

    def peek(self, n: int) -> bytes:
        with self._damage():
            return super().peek(n)

    def close(self) -> None:
        super().close()
        self._stream.close()

    @contextmanager
    def _damage(self) -> Iterator[None]:
        try:
            yield
        except (EOFError, OSError, zlib.error) as error:  # cut off, another file behind it, changed bytes
            got = f"{self._path}: after line {self._lines} of its contents: {error}"
            fix = "Compress it again, or fetch it again where it came from."
            raise DataError(self._field, got, "a complete gzip file", fix) from error


def lines(stream: BinaryIO) -> Iterator[Line]:
    """Yield the lines of `stream`, one in memory at a time, without a byte-order mark at the start."""
    number = end = 0
    while raw := stream.readline(MAX_ROW_BYTES + 1):
        number += 1
        first, end = end, end + len(raw)
        if len(raw) > MAX_ROW_BYTES and not raw.endswith(b"\n"):
            while (more := stream.readline(MAX_ROW_BYTES)) and not more.endswith(b"\n"):
                end += len(more)
            end += len(more)
            yield Line(number, raw[:200], first, f"a line of {end - first} bytes")
        elif number == 1 and raw.startswith(_MARK):
            if raw != _MARK:
                yield Line(number, raw.removeprefix(_MARK), first + len(_MARK))
        else:
            yield Line(number, raw, first)


def too_long(where: str, got: str, field: str) -> DataError:
    """Return the error for a row beyond `MAX_ROW_BYTES`."""
    fix = "Put each row on a line of its own, and close quotations."
    return DataError(field, f"{where}: {got}", f"rows of at most {MAX_ROW_BYTES} bytes", fix)


def not_utf8(path: Path, line: Line, start: int, field: str) -> DataError:
    """Return the error for byte `start` of a line, which is not UTF-8."""
    got = f"{path}, line {line.number}: byte {line.raw[start]:#04x} at offset {line.offset + start}"
    wide = next((name for mark, name in _WIDE.items() if line.offset == 0 and line.raw.startswith(mark)), None)
    wide = wide or ("utf-16" if b"\0" in line.raw else None)
    if wide is not None:
        got = f"{got}, a file in {wide.upper()}"
    fix = f"Convert the file, for example with `iconv -f {wide or 'latin1'} -t utf-8`."
    return DataError(field, got, "text in UTF-8", fix)


class CsvFeed:
    """The lines of a CSV file as input of the csv module: text, split at every kind of line break.

    The csv module decides where a row ends. An error in the bytes of a row is kept in `wrong` until `begin` is called
    for the next, so that an invalid row can be skipped and those after it still be read.
    """

    def __init__(self, stream: BinaryIO, path: Path, field: str) -> None:
        self.path, self.field, self.size = path, field, 0
        self.wrong: DataError | None = None
        self._lines = lines(stream)
        self._pending: list[tuple[str, DataError | None]] = []
        self._text: list[str] = []

    def __iter__(self) -> CsvFeed:
        return self

    def begin(self) -> None:
        """Start a new row."""
        self.size, self.wrong, self._text = 0, None, []

    @property
    def text(self) -> str:
        """The text of the row so far."""
        return "".join(self._text)

    def __next__(self) -> str:
        if not self._pending:
            self._pending = self._read()[::-1]
        piece, wrong = self._pending.pop()
        self._text.append(piece)
        self.wrong = self.wrong or wrong
        return piece

    def _read(self) -> list[tuple[str, DataError | None]]:
        line = next(self._lines)
        self.size += len(line.raw)
        where = f"{self.path}, line {line.number}"
        if line.wrong or self.size > MAX_ROW_BYTES:
            raise too_long(
                where, line.wrong or f"a row of more than {MAX_ROW_BYTES} bytes ends here or later", self.field
            )
        wrong = None
        try:
            text = line.raw.decode("utf-8")
        except UnicodeDecodeError as error:
            wrong = not_utf8(self.path, line, error.start, self.field)
            text = line.raw.decode("utf-8", "surrogateescape")
        if wrong is None and "\0" in text:
            offset = line.offset + line.raw.index(b"\0")
            fix = "Remove it; a file full of them may be UTF-16: convert it with `iconv -f utf-16 -t utf-8`."
            wrong = DataError(self.field, f"{where}: a NUL at offset {offset}", "text", fix)
        return [(piece, wrong if _INVALID.search(piece) else None) for piece in _PHYSICAL.findall(text)]
