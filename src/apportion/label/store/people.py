"""Annotators: names, and their entries in the database."""

from __future__ import annotations

import time
from collections.abc import Sequence

from sqlalchemy import insert, select
from sqlalchemy.exc import IntegrityError

from apportion.errors import DataError, unknown_name
from apportion.label.store.database import Store
from apportion.label.store.schema import annotators

FIELD = "annotator"
LONGEST = 60  # characters of a name


def sign_in(store: Store, name: str, allowed: Sequence[str] | None = None) -> int:
    """Return the id of the annotator `name`, who is added where the database does not have them.

    Args:
        allowed: names that may sign in; None allows every name.

    Raises:
        DataError: an empty name, one that is too long or has control characters, one that is not `allowed`.
    """
    name = " ".join(name.split())
    if not name or len(name) > LONGEST or not name.isprintable():
        raise DataError(FIELD, name[:LONGEST], f"a name of 1 to {LONGEST} printable characters", "Write your name.")
    if allowed is not None and name not in allowed:
        hint = unknown_name(FIELD, name, allowed).fix if len(name) > 2 else ""
        near = hint if hint.startswith("Did") else "Check the spelling, or have your name added to the list."
        raise DataError(FIELD, name, "one of the names that may sign in", near)
    found = find_annotator(store, name)
    if found is not None:
        return found
    try:
        with store.writing() as connection:
            connection.execute(insert(annotators).values(name=name, created=time.time()))
    except IntegrityError:
        pass  # the same person signed in twice at the same moment
    found = find_annotator(store, name)
    assert found is not None
    return found


def find_annotator(store: Store, name: str) -> int | None:
    """Return the id of the annotator `name`, or None."""
    with store.reading() as connection:
        return connection.execute(select(annotators.c.id).where(annotators.c.name == name)).scalar()


def name_of(store: Store, annotator: int) -> str | None:
    """Return the name of an annotator, or None for an unknown id."""
    with store.reading() as connection:
        return connection.execute(select(annotators.c.name).where(annotators.c.id == annotator)).scalar()
