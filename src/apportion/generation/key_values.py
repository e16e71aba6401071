"""Key-value caches of the rows being generated: rows are added and removed while others continue."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

Pair = tuple[Tensor, Tensor]
ROOM = 32  # least number of columns added when the buffers are full


class Past(Protocol):
    """The key-value cache of the rows in the batch."""

    open: bool  # whether rows may be added while others are being generated

    def add_rows(self, prefilled: Any, seen: Tensor, source: Tensor) -> None:
        """Add rows behind the others, row i with prompt source[i] (n,) of cache `prefilled` with mask `seen` (N,W)."""

    def keep_rows(self, rows: Tensor) -> None:
        """Keep `rows` (n,) of the batch, in this order; remove the others."""


class KeyValueBuffers:
    """Keys and values of every layer in buffers (rows, heads, columns, size), one column a token of the batch.

    Every row's tokens are contiguous and end at column `used`, also those of rows that are added later; the other
    columns are stale or 0, and `seen` is False on them.

    Args:
        rows: largest number of rows.
        longest: largest number of columns of a row.
    """

    open = True

    def __init__(self, rows: int, longest: int) -> None:
        self.most, self.longest = rows, longest + 1  # one column may be masked: see `extra_padding`
        self.layers: list[Pair] = []
        self.rows = self.used = 0
        self.seen = torch.zeros(0, 0, dtype=torch.bool)

    def add_rows(self, prefilled: Any, seen: Tensor, source: Tensor) -> None:
        """See `Past.add_rows`."""
        width, first = seen.shape[1], self.rows
        if not self.layers:
            self._allocate(prefilled, width)
        if not self.rows:
            self.used = 0
        short = width - self.used
        if short > 0:  # shift the present rows to the right
            self._move(torch.arange(self.rows, device=self.seen.device), 0, short)
        self.rows += len(source)
        at = slice(self.used - width, self.used)
        self.seen[first : self.rows] = False
        self.seen[first : self.rows, at] = seen[source]
        for layer, pair in zip(prefilled.layers, self.layers, strict=True):
            for new, buffer in zip((layer.keys, layer.values), pair, strict=True):
                buffer[first : self.rows, :, at] = new[source].to(buffer.dtype)

    def keep_rows(self, rows: Tensor) -> None:
        """See `Past.keep_rows`. Columns that no remaining row attends to are freed."""
        self._move(rows, self._unseen(rows), 0)
        self.rows = len(rows)

    def next_column(self) -> int:
        """Allocate the column of the next token, visible to every row, and return its index."""
        if self.used == self.seen.shape[1]:
            all_rows = torch.arange(self.rows, device=self.seen.device)
            unseen = self._unseen(all_rows)
            if unseen >= max(1, min(ROOM, self.used // 4)):
                self._move(all_rows, unseen, 0)
            else:
                self._widen(self.used + max(ROOM, self.used // 8))
        self.seen[: self.rows, self.used] = True
        self.used += 1
        return self.used - 1

    def _unseen(self, rows: Tensor) -> int:
        """Return the number of columns before the longest of `rows` that can be freed: all but one."""
        real = self.seen[rows, : self.used].any(dim=0)
        return max(0, int(real.int().argmax()) - 1) if len(rows) else self.used

    def _allocate(self, prefilled: Any, width: int) -> None:
        columns = min(max(width, self.longest), width + ROOM)
        for layer in prefilled.layers:
            shapes = [(self.most, t.shape[1], columns, t.shape[3]) for t in (layer.keys, layer.values)]
            keys, values = (torch.zeros(s, dtype=layer.keys.dtype, device=layer.keys.device) for s in shapes)
            self.layers.append((keys, values))
        self.seen = torch.zeros(self.most, columns, dtype=torch.bool, device=prefilled.layers[0].keys.device)

    def _widen(self, columns: int) -> None:
        """Grow to `columns`, one layer after the other, so that two copies of only one layer exist at a time."""
        more = columns - self.seen.shape[1]
        self.seen = torch.nn.functional.pad(self.seen, (0, more))
        for i, pair in enumerate(self.layers):
            keys, values = (torch.nn.functional.pad(t, (0, 0, 0, more)) for t in pair)
            self.layers[i] = (keys, values)

    def _move(self, rows: Tensor, left: int, right: int) -> None:
        """Move `rows` to the front and shift their columns by `left` or by `right`."""
        if self.used + right > self.seen.shape[1]:
            self._widen(self.used + right + ROOM)
        old, new = slice(left, self.used), slice(right, self.used - left + right)
        seen = self.seen[rows, old]  # indexing copies, so that source and target may overlap
        self.seen[: len(rows)] = False
        self.seen[: len(rows), new] = seen
        for pair in self.layers:
            for buffer in pair:
                buffer[: len(rows), :, new] = buffer[rows, :, old]
        self.used = new.stop


class ModelCache:
    """A transformers cache for models that cache more than keys and values; all rows are added at once."""

    open = False

    def __init__(self) -> None:
        self.cache: Any = None
        self.seen = torch.zeros(0, 0, dtype=torch.bool)

    def add_rows(self, prefilled: Any, seen: Tensor, source: Tensor) -> None:
        """See `Past.add_rows`; the batch must be empty."""
        self.cache, self.seen = prefilled, seen
        if not torch.equal(source, torch.arange(len(seen), device=source.device)):
            self.keep_rows(source)

    def keep_rows(self, rows: Tensor) -> None:
        """See `Past.keep_rows`."""
        self.seen = self.seen[rows]
        self.cache.reorder_cache(rows)

    def next_column(self) -> None:
        """Make the next token visible to every row."""
        self.seen = torch.nn.functional.pad(self.seen, (0, 1), value=True)
