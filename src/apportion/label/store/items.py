"""Items added to a database: each once, with the number of people who are to rank it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import NamedTuple

from sqlalchemy import func, insert, select

from apportion.errors import DataError
from apportion.label.items import FIELD, Item
from apportion.label.store.database import Store
from apportion.label.store.schema import items as table

BATCH = 500  # ids a query


class Added(NamedTuple):
    """Numbers of items: added now, and there before."""

    new: int
    known: int


def add_items(store: Store, items: Sequence[Item], *, overlap: float = 0.0, overlap_annotators: int = 2) -> Added:
    """Add the items that the database does not have, in their order; all of them or none.

    Args:
        overlap: share of them in [0, 1] that `overlap_annotators` people rank, spread evenly; one person ranks the
            others.

    Raises:
        DataError: an id that the database has with other texts.
    """
    with store.writing() as connection:
        known: dict[str, str] = {}
        for first in range(0, len(items), BATCH):
            ids = [one.item for one in items[first : first + BATCH]]
            found = connection.execute(select(table.c.item, table.c.content).where(table.c.item.in_(ids)))
            known |= {row.item: row.content for row in found}
        for one in items:
            if known.get(one.item, one.content) != one.content:
                got = f"{one.where}: item {one.item!r:.40}, which {store.name} has with other texts"
                fix = "Give it another id, or name a new database."
                raise DataError(FIELD, got, "the same prompt and answers for an id", fix)
        new = [one for one in items if one.item not in known]
        offset = connection.execute(select(func.count()).select_from(table)).scalar_one()
        now = time.time()
        rows = [
            {
                "item": one.item,
                "content": one.content,
                "size": len(one.completions),
                "wanted": overlap_annotators if is_shared(offset + i, overlap) else 1,
                "ranked": 0,
                "is_open": True,
                "created": now,
            }
            for i, one in enumerate(new)
        ]
        if rows:
            connection.execute(insert(table), rows)
    return Added(len(new), len(items) - len(new))


def is_shared(index: int, share: float) -> bool:
    """Whether item number `index` is one that several people rank: of the first n items, floor(n · share) are."""
    return int((index + 1) * share + 1e-9) > int(index * share + 1e-9)
