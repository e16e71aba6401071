"""Leases: which items an annotator gets next, so that two people do not rank the same one by accident."""

from __future__ import annotations

import json
import random
import time
from typing import Any, NamedTuple

from sqlalchemy import ColumnElement, Connection, and_, delete, exists, func, insert, select, update

from apportion.label.store.database import Store
from apportion.label.store.schema import assignments, items, meta


class Work(NamedTuple):
    """An item as one annotator sees it.

    Attributes:
        item: its id. prompt: text or messages. answers: the K answers in the order shown. expires: Unix seconds at
            which another person may get it.
    """

    item: str
    prompt: Any
    answers: list[Any]
    expires: float


def take(store: Store, annotator: int, count: int, lease_seconds: float, now: float | None = None) -> list[Work]:
    """Return up to `count` items that `annotator` is to rank now, and lease them for `lease_seconds`.

    Those that they have already come first, with a new lease. An item is given to no more people at a time than are to
    rank it; a lease that has expired does not count.
    """
    now = time.time() if now is None else now
    with store.writing() as connection:
        _queue(store, connection)
        mine = _renewed(connection, annotator, count, now, now + lease_seconds)
        wanted = count - len(mine)
        fresh = _leased(store, connection, annotator, wanted, now, now + lease_seconds) if wanted > 0 else []
        return [_work(row) for row in (*mine, *fresh)]


def release(store: Store, annotator: int) -> None:
    """End all leases of an annotator who leaves."""
    mine = and_(assignments.c.annotator_id == annotator, assignments.c.state == "leased")
    with store.writing() as connection:
        connection.execute(delete(assignments).where(mine))


def shown_order(seed: int, annotator: int, item: str, size: int) -> list[int]:
    """Return the completion at each position of the page, the same for equal arguments: (K,) a permutation."""
    order = list(range(size))
    random.Random(f"{seed}:{annotator}:{item}").shuffle(order)
    return order


def is_taken(now: float) -> ColumnElement[bool]:
    """The condition of assignments that count towards an item's people: ranked, or leased at `now`."""
    live = and_(assignments.c.state == "leased", assignments.c.expires > now)
    return (assignments.c.state == "ranked") | live


def _queue(store: Store, connection: Connection) -> None:
    """Let one transaction at a time give out items; SQLite has one writer in any case."""
    if not store.is_sqlite:
        connection.execute(select(meta.c.value).where(meta.c.name == "lock").with_for_update())


def _people(now: float) -> ColumnElement[int]:
    """The number of people who have ranked an item or have it on their screen."""
    counted = select(func.count()).where(assignments.c.item_id == items.c.id, is_taken(now))
    return counted.correlate(items).scalar_subquery()


COLUMNS = (items.c.id, items.c.item, items.c.content, items.c.size, assignments.c.shown, assignments.c.expires)


def _renewed(connection: Connection, annotator: int, count: int, now: float, until: float) -> list[Any]:
    """Return the annotator's own leased items, renewed; those that expired and went to others are given up."""
    own = and_(assignments.c.annotator_id == annotator, assignments.c.state == "leased")
    lost = and_(own, assignments.c.expires <= now, items.c.id == assignments.c.item_id, _people(now) >= items.c.wanted)
    given_up = connection.execute(select(assignments.c.id).where(lost)).scalars().all()
    if given_up:
        connection.execute(delete(assignments).where(assignments.c.id.in_(given_up)))
    query = select(*COLUMNS, assignments.c.id.label("lease")).join_from(assignments, items).where(own)
    rows = connection.execute(query.order_by(assignments.c.id).limit(count)).all()
    if rows:
        ids = [row.lease for row in rows]
        connection.execute(update(assignments).where(assignments.c.id.in_(ids)).values(expires=until))
    return [(row.item, row.content, row.shown, until) for row in rows]


def _leased(store: Store, connection: Connection, annotator: int, count: int, now: float, until: float) -> list[Any]:
    """Return items that are new to the annotator, leased to them."""
    mine = exists().where(assignments.c.item_id == items.c.id, assignments.c.annotator_id == annotator)
    free = and_(items.c.is_open, ~mine, _people(now) < items.c.wanted)
    query = select(items.c.id, items.c.item, items.c.content, items.c.size).where(free).order_by(items.c.id)
    found = []
    for row in connection.execute(query.limit(count)).all():
        shown = json.dumps(shown_order(store.seed, annotator, row.item, row.size))
        values = {"item_id": row.id, "annotator_id": annotator, "shown": shown, "state": "leased", "expires": until}
        connection.execute(insert(assignments).values(values))
        found.append((row.item, row.content, shown, until))
    return found


def _work(row: tuple[str, str, str, float]) -> Work:
    item, content, shown, expires = row
    loaded = json.loads(content)
    return Work(item, loaded["prompt"], [loaded["completions"][i] for i in json.loads(shown)], expires)
