"""Tables of the database; their version is in `label_meta`."""

from __future__ import annotations

from sqlalchemy import (
    Boolean,
    Column,
    Float,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
)

VERSION = 1  # of the tables; a database of a newer one is refused

tables = MetaData()

# version, seed, secret, study, and a row that is locked while items are given out
meta = Table("label_meta", tables, Column("name", String(32), primary_key=True), Column("value", Text, nullable=False))

items = Table(
    "label_items",
    tables,
    Column("id", Integer, primary_key=True),
    Column("item", String(128), nullable=False, unique=True),
    Column("content", Text, nullable=False),  # JSON: prompt and completions, in the order of the file
    Column("size", Integer, nullable=False),  # K
    Column("wanted", Integer, nullable=False),  # people who are to rank it
    Column("ranked", Integer, nullable=False, default=0),  # people who have
    Column("is_open", Boolean, nullable=False, default=True),  # ranked < wanted
    Column("created", Float, nullable=False),
    Index("label_items_open", "is_open", "id"),
)

annotators = Table(
    "label_annotators",
    tables,
    Column("id", Integer, primary_key=True),
    Column("name", String(80), nullable=False, unique=True),
    Column("created", Float, nullable=False),
)

# one row for each item that an annotator was shown: a lease until it is answered, then its current answer
assignments = Table(
    "label_assignments",
    tables,
    Column("id", Integer, primary_key=True),
    Column("item_id", ForeignKey("label_items.id"), nullable=False),
    Column("annotator_id", ForeignKey("label_annotators.id"), nullable=False),
    Column("shown", Text, nullable=False),  # JSON: the completion at each position of the page
    Column("state", String(8), nullable=False),  # leased, ranked, skipped
    Column("expires", Float, nullable=False),  # of a lease, Unix seconds
    Column("answer_id", Integer, nullable=True),  # of the current answer
    UniqueConstraint("item_id", "annotator_id"),
    Index("label_assignments_annotator", "annotator_id", "state"),
)

# every answer that was ever received, in the order of arrival: nothing is overwritten
answers = Table(
    "label_answers",
    tables,
    Column("id", Integer, primary_key=True),
    Column("client_id", String(64), nullable=False, unique=True),  # made by the browser: a second copy is recognised
    Column("item_id", ForeignKey("label_items.id"), nullable=False),
    Column("annotator_id", ForeignKey("label_annotators.id"), nullable=False),
    Column("kind", String(8), nullable=False),  # ranking, skip
    Column("ranks", Text, nullable=True),  # JSON, in the order of the file
    Column("shown", Text, nullable=False),
    Column("seconds", Float, nullable=False),
    Column("replaces", String(64), nullable=True),
    Column("status", String(8), nullable=False),  # current, replaced, refused
    Column("created", Float, nullable=False),
    Index("label_answers_annotator", "annotator_id", "id"),
)
