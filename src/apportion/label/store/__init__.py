"""The database of items, annotators and rankings: SQLite, or anything that SQLAlchemy has a URL for."""

from apportion.label.store.answers import Answer, Outcome, submit
from apportion.label.store.database import Store, open_store
from apportion.label.store.items import add_items
from apportion.label.store.leases import Work, release, take
from apportion.label.store.people import find_annotator, sign_in
from apportion.label.store.reading import Progress, history, progress, rankings

__all__ = [
    "Answer",
    "Outcome",
    "Progress",
    "Store",
    "Work",
    "add_items",
    "find_annotator",
    "history",
    "open_store",
    "progress",
    "rankings",
    "release",
    "sign_in",
    "submit",
    "take",
]
