"""Answers received: each saved once, checked against the item, and the one it replaces kept beside it."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from sqlalchemy import Connection, Row, func, insert, select, update

from apportion.errors import DataError
from apportion.label.store.database import Store
from apportion.label.store.leases import shown_order
from apportion.label.store.schema import answers, assignments, items

Kind = Literal["ranking", "skip"]
Outcome = Literal["saved", "known", "refused"]
LONGEST = 24 * 3600.0  # seconds for one item


@dataclass(frozen=True)
class Answer:
    """What an annotator's browser sends about one item.

    Attributes:
        id: made by the browser; a second copy of the same answer has the same id. item: the item's id.
        kind: "ranking" or "skip". ranks: of a ranking, (K,) in the order shown, 1 is best, equal numbers are ties, None
            for "cannot judge". seconds: time spent on it. replaces: the id of the own answer that this one corrects.
    """

    id: str
    item: str
    kind: Kind
    ranks: Sequence[int | None] | None = None
    seconds: float = 0.0
    replaces: str | None = None


def submit(store: Store, annotator: int, answer: Answer) -> Outcome:
    """Save an answer and return "saved", "known" where it had been saved before, or "refused".

    An answer is refused, and still recorded, where the annotator has another current answer to the item and this one
    does not say that it replaces it: two windows ranked the same item.

    Raises:
        DataError: an unknown item, ranks that do not fit it, an id that was used for something else; nothing is saved.
    """
    with store.writing() as connection:
        # the row of the item is locked, so that two answers to it are counted one after the other
        item = connection.execute(select(items).where(items.c.item == answer.item).with_for_update()).first()
        if item is None:
            fix = "Reload the page; the item may be of another database."
            raise DataError("item", answer.item, "an item of this database", fix)
        before = connection.execute(select(answers).where(answers.c.client_id == answer.id)).first()
        lease = _assignment(store, connection, annotator, item)
        ranks = in_file_order(check_answer(answer, item.size), json.loads(lease.shown))
        text = None if ranks is None else json.dumps(ranks)
        if before is not None:
            return _known(before, annotator, item.id, answer, text)
        current = connection.execute(select(answers).where(answers.c.id == lease.answer_id)).first()
        refused = current is not None and current.client_id != answer.replaces
        values = {
            "client_id": answer.id,
            "item_id": item.id,
            "annotator_id": annotator,
            "kind": answer.kind,
            "ranks": text,
            "shown": lease.shown,
            "seconds": answer.seconds,
            "replaces": answer.replaces,
            "status": "refused" if refused else "current",
            "created": time.time(),
        }
        number = connection.execute(insert(answers).values(values).returning(answers.c.id)).scalar_one()
        if refused:
            return "refused"
        if current is not None:
            connection.execute(update(answers).where(answers.c.id == current.id).values(status="replaced"))
        state = "ranked" if answer.kind == "ranking" else "skipped"
        own = assignments.c.id == lease.id
        connection.execute(update(assignments).where(own).values(state=state, answer_id=number, expires=0.0))
        _count(connection, item)
        return "saved"


def check_answer(answer: Answer, size: int) -> list[int | None] | None:
    """Return the ranks (K,) of an answer to an item with `size` answers, None of a skipped one. Raises DataError."""
    if not 0 <= answer.seconds <= LONGEST:
        fix = "Send the seconds that the item was on the screen."
        raise DataError("seconds", answer.seconds, f"a number from 0 to {LONGEST:g}", fix)
    if answer.kind == "skip":
        if answer.ranks is not None:
            raise DataError("ranks", answer.ranks, "no ranks for an item that is skipped", "Rank it, or skip it.")
        return None
    ranks = list(answer.ranks or ())
    if len(ranks) != size:
        fix = "Give each answer a rank, or null for one that cannot be judged."
        raise DataError("ranks", ranks, f"{size} ranks, one an answer", fix)
    given = sorted({rank for rank in ranks if rank is not None})
    if given != list(range(1, len(given) + 1)):
        fix = "Number the ranks 1, 2, 3, … without a gap; equal numbers are ties."
        raise DataError("ranks", ranks, "1 for the best, and each number up to the largest", fix)
    if sum(rank is not None for rank in ranks) < 2:
        fix = "Rank two or more, or skip the item."
        raise DataError("ranks", ranks, "at least two answers that were judged", fix)
    return ranks


def in_file_order(ranks: Sequence[int | None] | None, shown: Sequence[int]) -> list[int | None] | None:
    """Return ranks (K,) given in the order shown in the order of the file; `shown[p]` is the completion at p."""
    if ranks is None:
        return None
    ordered: list[int | None] = [None] * len(shown)
    for position, index in enumerate(shown):
        ordered[index] = ranks[position]
    return ordered


def _assignment(store: Store, connection: Connection, annotator: int, item: Row[Any]) -> Row[Any]:
    """Return the annotator's row for an item; without one (the lease went to somebody else meanwhile), a new one."""
    own = (assignments.c.item_id == item.id) & (assignments.c.annotator_id == annotator)
    found = connection.execute(select(assignments).where(own)).first()
    if found is None:
        shown = json.dumps(shown_order(store.seed, annotator, item.item, item.size))
        values = {"item_id": item.id, "annotator_id": annotator, "shown": shown, "state": "leased", "expires": 0.0}
        connection.execute(insert(assignments).values(values))
        found = connection.execute(select(assignments).where(own)).one()
    return found


def _known(before: Row[Any], annotator: int, item: int, answer: Answer, ranks: str | None) -> Outcome:
    same = (before.annotator_id, before.item_id, before.kind, before.ranks) == (annotator, item, answer.kind, ranks)
    if not same:
        fix = "Make a new id for each answer; to correct one, name it in `replaces`."
        raise DataError("id", answer.id, "an id of one answer only; this one has another answer", fix)
    return "refused" if before.status == "refused" else "known"


def _count(connection: Connection, item: Row[Any]) -> None:
    ranked = is_ranking_of(item.id)
    number = connection.execute(select(func.count()).select_from(assignments).where(ranked)).scalar_one()
    values = {"ranked": number, "is_open": number < item.wanted}
    connection.execute(update(items).where(items.c.id == item.id).values(values))


def is_ranking_of(item: int) -> Any:
    """The condition of assignments of an item that hold a ranking."""
    return (assignments.c.item_id == item) & (assignments.c.state == "ranked")
