"""Keys and values of the rows being written: preallocated, written in place, rows enter and leave."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

Pair = tuple[Tensor, Tensor]
ROOM = 32  # columns that are added at least when the buffers are full


class Past(Protocol):
    """What the rows in the batch have read: rows enter behind the others, and leave."""

    open: bool  # whether rows may enter while others are being written

    def enter(self, read: Any, seen: Tensor, source: Tensor) -> None:
        """Let rows in: row i has read prompt source[i] (n,) of `read`; `seen` (N,W) is True on its real columns."""

    def keep(self, rows: Tensor) -> None:
        """Keep `rows` (n,) of the batch, in this order; the others leave."""


class Buffers:
    """Keys and values of every layer in buffers (rows, heads, columns, size), one column a token of the batch.

    Every row's tokens stand together and end at column `used`; the columns before and behind them hold whatever was
    there, or 0, and `seen` is False on them. Rows of a prompt that enters late stand at the same end as the others.

    Args:
        rows: most rows at a time.
        longest: most columns that a row needs.
    """

    open = True

    def __init__(self, rows: int, longest: int) -> None:
        self.most, self.longest = rows, longest + 1  # one column is never seen: see `spare`
        self.layers: list[Pair] = []
        self.rows = self.used = 0
        self.seen = torch.zeros(0, 0, dtype=torch.bool)

    def enter(self, read: Any, seen: Tensor, source: Tensor) -> None:
        """See `Past.enter`."""
        width, first = seen.shape[1], self.rows
        if not self.layers:
            self._allocate(read, width)
        if not self.rows:
            self.used = 0
        short = width - self.used
        if short > 0:  # the rows that are here move right
            self._move(torch.arange(self.rows, device=self.seen.device), 0, short)
        self.rows += len(source)
        at = slice(self.used - width, self.used)
        self.seen[first : self.rows] = False
        self.seen[first : self.rows, at] = seen[source]
        for layer, pair in zip(read.layers, self.layers, strict=True):
            for new, buffer in zip((layer.keys, layer.values), pair, strict=True):
                buffer[first : self.rows, :, at] = new[source].to(buffer.dtype)

    def keep(self, rows: Tensor) -> None:
        """See `Past.keep`. Columns that no row that stays has seen are given back."""
        self._move(rows, self._unseen(rows), 0)
        self.rows = len(rows)

    def next_column(self) -> int:
        """Return the column of the next token, seen by every row; there is room for it."""
        if self.used == self.seen.shape[1]:
            everyone = torch.arange(self.rows, device=self.seen.device)
            unseen = self._unseen(everyone)
            if unseen >= max(1, min(ROOM, self.used // 4)):
                self._move(everyone, unseen, 0)
            else:
                self._widen(self.used + max(ROOM, self.used // 8))
        self.seen[: self.rows, self.used] = True
        self.used += 1
        return self.used - 1

    def _unseen(self, rows: Tensor) -> int:
        """Return how many columns before the longest of `rows` can go: all but one."""
        real = self.seen[rows, : self.used].any(dim=0)
        return max(0, int(real.int().argmax()) - 1) if len(rows) else self.used

    def _allocate(self, read: Any, width: int) -> None:
        columns = min(max(width, self.longest), width + ROOM)
        for layer in read.layers:
            shapes = [(self.most, t.shape[1], columns, t.shape[3]) for t in (layer.keys, layer.values)]
            keys, values = (torch.zeros(s, dtype=layer.keys.dtype, device=layer.keys.device) for s in shapes)
            self.layers.append((keys, values))
        self.seen = torch.zeros(self.most, columns, dtype=torch.bool, device=read.layers[0].keys.device)

    def _widen(self, columns: int) -> None:
        """Make room for `columns`, one layer after the other, so that no second copy of all of them ever stands."""
        more = columns - self.seen.shape[1]
        self.seen = torch.nn.functional.pad(self.seen, (0, more))
        for i, pair in enumerate(self.layers):
            keys, values = (torch.nn.functional.pad(t, (0, 0, 0, more)) for t in pair)
            self.layers[i] = (keys, values)

    def _move(self, rows: Tensor, left: int, right: int) -> None:
        """Put `rows` first and shift their columns by `left` or by `right`."""
        if self.used + right > self.seen.shape[1]:
            self._widen(self.used + right + ROOM)
        old, new = slice(left, self.used), slice(right, self.used - left + right)
        seen = self.seen[rows, old]  # indices copy, so that what is moved may overlap where it came from
        self.seen[: len(rows)] = False
        self.seen[: len(rows), new] = seen
        for pair in self.layers:
            for buffer in pair:
                buffer[: len(rows), :, new] = buffer[rows, :, old]
        self.used = new.stop


class Foreign:
    """A cache of transformers' own for models that keep more than keys and values; rows enter together, and leave."""

    open = False

    def __init__(self) -> None:
        self.cache: Any = None
        self.seen = torch.zeros(0, 0, dtype=torch.bool)

    def enter(self, read: Any, seen: Tensor, source: Tensor) -> None:
        """See `Past.enter`; the batch is empty."""
        self.cache, self.seen = read, seen
        if not torch.equal(source, torch.arange(len(seen), device=source.device)):
            self.keep(source)

    def keep(self, rows: Tensor) -> None:
        """See `Past.keep`."""
        self.seen = self.seen[rows]
        self.cache.reorder_cache(rows)

    def next_column(self) -> None:
        """The next token is seen by every row."""
        self.seen = torch.nn.functional.pad(self.seen, (0, 1), value=True)
