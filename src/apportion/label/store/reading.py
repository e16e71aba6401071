"""Queries of a database: an annotator's progress and last answers, all rankings, totals."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, NamedTuple

from sqlalchemy import func, select

from apportion.label.store.database import Store
from apportion.label.store.schema import annotators, answers, assignments, items

CHUNK = 500  # rows in memory at a time


class Progress(NamedTuple):
    """Numbers of items of one annotator: ranked, skipped, and left that they may still get."""

    ranked: int
    skipped: int
    left: int


class Ranking(NamedTuple):
    """An answer that was received, in the order of the file.

    Attributes:
        item: the item's id. prompt, completions: its texts or messages. annotator: a name. kind: "ranking" or "skip".
        ranks: (K,) 1 is best, equal numbers are ties, None for "cannot judge"; None of a skipped item. shown: (K,) the
            completion at each position of the page. seconds: time on the screen. status: current, replaced or refused.
        created: Unix seconds.
    """

    item: str
    prompt: Any
    completions: list[Any]
    annotator: str
    kind: str
    ranks: list[int | None] | None
    shown: list[int]
    seconds: float
    status: str
    created: float


def progress(store: Store, annotator: int) -> Progress:
    """Return the progress of an annotator."""
    own = assignments.c.annotator_id == annotator
    with store.reading() as connection:
        counts = select(assignments.c.state, func.count().label("number")).where(own).group_by(assignments.c.state)
        states: dict[str, int] = {row.state: row.number for row in connection.execute(counts)}
        total = connection.execute(select(func.count()).where(items.c.is_open)).scalar_one()
        mine = select(func.count()).select_from(assignments).join(items)
        closed = mine.where(own, assignments.c.state != "leased", items.c.is_open)
        answered = connection.execute(closed).scalar_one()
    return Progress(states.get("ranked", 0), states.get("skipped", 0), max(0, total - answered))


def history(store: Store, annotator: int, limit: int) -> list[dict[str, Any]]:
    """Return an annotator's last current answers, the newest first, as the page shows them.

    Each is {id, kind, item, prompt, answers, ranks}, answers and ranks in the order shown.
    """
    query = (
        select(answers.c.client_id, answers.c.kind, answers.c.ranks, answers.c.shown, items.c.item, items.c.content)
        .join_from(answers, items)
        .where(answers.c.annotator_id == annotator, answers.c.status == "current")
        .order_by(answers.c.id.desc())
        .limit(limit)
    )
    with store.reading() as connection:
        rows = connection.execute(query).all()
    found = []
    for row in rows:
        content, shown = json.loads(row.content), json.loads(row.shown)
        ranks = None if row.ranks is None else json.loads(row.ranks)
        found.append({
            "id": row.client_id,
            "kind": row.kind,
            "item": row.item,
            "prompt": content["prompt"],
            "answers": [content["completions"][i] for i in shown],
            "ranks": None if ranks is None else [ranks[i] for i in shown],
        })  # fmt: skip
    return found


def rankings(store: Store, *, every: bool = False) -> Iterator[Ranking]:
    """Yield the current rankings in the order of their items, then of arrival.

    Args:
        every: also skipped items, and answers that were replaced or refused.
    """
    columns = (answers, items.c.item, items.c.content, annotators.c.name)
    query = select(*columns).join_from(answers, items).join(annotators, answers.c.annotator_id == annotators.c.id)
    if not every:
        query = query.where(answers.c.status == "current", answers.c.kind == "ranking")
    with store.reading() as connection:
        for row in connection.execution_options(yield_per=CHUNK).execute(query.order_by(items.c.id, answers.c.id)):
            content = json.loads(row.content)
            ranks = None if row.ranks is None else json.loads(row.ranks)
            yield Ranking(
                row.item, content["prompt"], content["completions"], row.name, row.kind, ranks,
                json.loads(row.shown), row.seconds, row.status, row.created,
            )  # fmt: skip


def totals(store: Store) -> dict[str, int]:
    """Return numbers of the whole database: items, closed items, rankings wanted, shared items, annotators."""
    with store.reading() as connection:
        query = select(
            func.count(),
            func.coalesce(func.sum(items.c.wanted), 0),
            func.count().filter(items.c.is_open.is_(False)),
            func.count().filter(items.c.wanted > 1),
        )
        count, wanted, closed, shared = connection.execute(query).one()
        people = connection.execute(select(func.count()).select_from(annotators)).scalar_one()
    return {"items": count, "wanted": int(wanted), "closed": closed, "shared": shared, "annotators": people}
