"""Lines of a file that holds a table: read one after the other, each with its number and what is wrong with it."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from apportion.errors import DataError

LONGEST = 2**24  # bytes of a row; what is longer is no row, but a file without line breaks or an open quotation
_MARK = b"\xef\xbb\xbf"
_COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"PK\x03\x04": "zip",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
}
_STRANGE = re.compile("[\0\udc80-\udcff]")  # a NUL, or a byte that is no UTF-8
_PHYSICAL = re.compile(r"[^\r\n]*(?:\r\n|\r|\n)|[^\r\n]+")


class Line(NamedTuple):
    """A line: its number from 1, its bytes with their line break, where they begin in the file, and what is wrong."""

    number: int
    raw: bytes
    offset: int
    wrong: str | None = None  # too long: `raw` is its beginning


def opened(path: Path, field: str) -> BinaryIO:
    """Open a table.

    Raises:
        DataError: it cannot be read, is no regular file (a pipe or a device has no end), or is compressed.
    """
    try:
        # not blocking: opening a pipe that nobody writes to would wait for ever
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except OSError as error:
        fix = "Check the path and its permissions."
        raise DataError(field, f"{path}: {error.strerror}", "a readable file", fix) from error
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        fix = "Write what it holds to a file first; it is read more than once."
        raise DataError(field, f"{path}, which is no regular file", "a file on disk", fix)
    stream = os.fdopen(handle, "rb")
    head = stream.read(6)
    stream.seek(0)
    kind = next((name for start, name in _COMPRESSED.items() if head.startswith(start)), None)
    if kind is not None:
        stream.close()
        fix = "Decompress it first, for example with `gunzip`."
        raise DataError(field, f"{path}, compressed with {kind}", "an uncompressed table", fix)
    return stream


def lines(stream: BinaryIO) -> Iterator[Line]:
    """Yield the lines of `stream`, each in memory alone; a byte-order mark at the beginning is no content."""
    number = offset = 0
    while raw := stream.readline(LONGEST + 1):
        number += 1
        first, size = offset, len(raw)
        if len(raw) > LONGEST and not raw.endswith(b"\n"):
            while (more := stream.readline(LONGEST)) and not more.endswith(b"\n"):
                size += len(more)
            yield Line(number, raw[:200], first, f"a line of {size + len(more)} bytes")
        elif number == 1 and raw.startswith(_MARK):
            if raw != _MARK:
                yield Line(number, raw.removeprefix(_MARK), first + len(_MARK))
        else:
            yield Line(number, raw, first)
        offset = stream.tell()


def too_long(where: str, got: str, field: str) -> DataError:
    """Return the error for a row beyond `LONGEST`."""
    fix = "Put each row on a line of its own, and close quotations."
    return DataError(field, f"{where}: {got}", f"rows of at most {LONGEST} bytes", fix)


def not_utf8(path: Path, line: Line, start: int, field: str) -> DataError:
    """Return the error for byte `start` of a line, which is no UTF-8."""
    got = f"{path}, line {line.number}: byte {line.raw[start]:#04x} at offset {line.offset + start}"
    fix = "Convert the file, for example with `iconv -f latin1 -t utf-8`."
    return DataError(field, got, "text in UTF-8", fix)


class CsvFeed:
    """The lines of a CSV file as the csv module wants them: text, split at every kind of line break.

    The csv module decides where a row ends. What is wrong with the bytes of a row is kept in `wrong` until `begin` is
    called for the next, so that one row can be left out and the ones after it still be read right.
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
        """Forget the row before."""
        self.size, self.wrong, self._text = 0, None, []

    @property
    def text(self) -> str:
        """What was read of the row."""
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
        if line.wrong or self.size > LONGEST:
            raise too_long(where, line.wrong or f"a row of more than {LONGEST} bytes ends here or later", self.field)
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
        return [(piece, wrong if _STRANGE.search(piece) else None) for piece in _PHYSICAL.findall(text)]
