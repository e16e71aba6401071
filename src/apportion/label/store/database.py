"""Opening a database, its transactions, and its errors as messages with their fix."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from sqlalchemy import URL, Connection, Engine, create_engine, event, insert, inspect, select
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError, SQLAlchemyError

from apportion.errors import ConfigError
from apportion.label.store import schema
from apportion.system.paths import local_path

FIELD = "database"
LOCK_SECONDS = 5.0  # that a transaction of SQLite waits for another process's
DRIVERS = {"postgresql": "postgresql+psycopg", "postgres": "postgresql+psycopg"}

# parts of the messages of SQLite and PostgreSQL, with what is expected and the fix
CAUSES = (
    ("readonly", "a database that can be written", "Check the permissions of the file and of its folder."),
    ("read-only", "a database that can be written", "Connect to the primary server, with a role that may write."),
    ("locked", "a database that no other program has locked", "Close the program that has it open, then try again."),
    ("not a database", "a database of SQLite", "Name another file; this one is something else, or damaged."),
    ("malformed", "an intact database of SQLite", "Restore a copy, or recover it with `sqlite3 FILE .recover`."),
    ("unable to open", "a file in a folder that exists and can be written", "Make the folder, or check the path."),
    ("full", "a disk with free space", "Free some space; nothing that was acknowledged is lost."),
    ("password", "a role with its password", "Check user and password, or use ~/.pgpass."),
    ("does not exist", "a database and a role that exist", "Create them first, for example with createdb."),
    ("permission denied", "a role that may create tables", "Grant it, or name another database."),
)
UNKNOWN_CAUSE = ("a database that can be reached", "Check that its server runs and that the address is right.")


class Store:
    """An open database.

    Attributes:
        engine: SQLAlchemy's. name: the database for messages, without a password. seed: of the orders shown.
        secret: key of sessions. study: a random id of this database.
    """

    def __init__(self, engine: Engine, name: str) -> None:
        self.engine, self.name = engine, name
        self.is_sqlite = engine.dialect.name == "sqlite"
        self._turn: Any = threading.Lock() if self.is_sqlite else nullcontext()  # SQLite has one writer, and no queue
        self.seed, self.secret, self.study = 0, "", ""

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """A transaction that reads."""
        with self.engine.connect() as connection:
            yield connection

    @contextmanager
    def writing(self) -> Iterator[Connection]:
        """A transaction that writes: committed at the end of the block, rolled back where it raises."""
        with self._turn, self.engine.connect() as plain:
            connection = plain.execution_options(apportion_writes=True)
            with connection.begin():
                yield connection

    def close(self) -> None:
        """Close all connections."""
        self.engine.dispose()


def open_store(database: str, *, create: bool = False, seed: int = 0) -> Store:
    """Open `database`, a file of SQLite or a URL.

    Args:
        create: make the tables where there are none, and check that it can be written. seed: kept in a new one.

    Raises:
        ConfigError: no such database, one that is locked, read-only, damaged, of a newer version or of something else,
            an unknown or incomplete URL, an absent driver.
    """
    url = url_of(database)
    name = url.render_as_string(hide_password=True) if "://" in database else database
    if url.drivername.startswith("sqlite") and not create:
        _check_exists(url, name)
    try:
        engine = _engine(url)
    except (ImportError, ModuleNotFoundError) as error:
        fix = "Install it: `pip install 'apportion[postgresql]'`."
        raise ConfigError(FIELD, f"{name}, whose driver is not installed ({error.name})", "a driver", fix) from None
    except (NoSuchModuleError, ArgumentError) as error:
        got = f"{name} ({str(error).splitlines()[0]})"
        fix = "Write a file name, or postgresql://user@host/name."
        raise ConfigError(FIELD, got, "a file of SQLite or a URL that SQLAlchemy knows", fix) from None
    store = Store(engine, name)
    try:
        _prepare(store, create, seed)
    except SQLAlchemyError as error:
        store.close()
        raise explained(error, name) from error
    except ConfigError:
        store.close()
        raise
    return store


def url_of(database: str) -> URL:
    """Return the URL of a file name or of a URL; PostgreSQL's gets its driver. Raises ConfigError."""
    if "://" not in database:
        return URL.create("sqlite", database=str(local_path(database, FIELD, ConfigError)))
    try:
        url = make_url(database)
    except (ArgumentError, ValueError):
        fix = "Write postgresql://user@host/name, or a file name."
        raise ConfigError(FIELD, "a URL that cannot be parsed", "a file name or a URL", fix) from None
    return url.set(drivername=DRIVERS.get(url.drivername, url.drivername))


def explained(error: SQLAlchemyError, name: str) -> ConfigError:
    """Return the error of a database as ConfigError with its fix."""
    reason = str(error.orig if isinstance(error, DBAPIError) and error.orig is not None else error).strip()
    first = " ".join(reason.splitlines()[:1])
    expected, fix = next(((e, f) for part, e, f in CAUSES if part in reason.lower()), UNKNOWN_CAUSE)
    return ConfigError(FIELD, f"{name} ({first})", expected, fix)


def _check_exists(url: URL, name: str) -> None:
    path = url.database or ""
    if path.startswith("file:") or path in ("", ":memory:"):
        return
    if not local_path(path, FIELD, ConfigError).is_file():
        fix = "Check the path; `apportion label --data samples.jsonl` makes one."
        raise ConfigError(FIELD, name, "a database of `apportion label`", fix)


def _engine(url: URL) -> Engine:
    if not url.drivername.startswith("sqlite"):
        return create_engine(url, pool_size=16, max_overflow=16, pool_pre_ping=True, isolation_level="READ COMMITTED")
    engine = create_engine(url, pool_size=16, max_overflow=32, connect_args={"timeout": LOCK_SECONDS})

    @event.listens_for(engine, "connect")
    def _connected(connection: Any, _: Any) -> None:
        connection.isolation_level = None  # sqlite3 would begin transactions late, and as readers
        cursor = connection.cursor()
        if cursor.execute("PRAGMA journal_mode").fetchone()[0] != "wal":
            cursor.execute("PRAGMA journal_mode=WAL")  # readers do not wait for the writer
        cursor.execute("PRAGMA synchronous=FULL")  # what was acknowledged survives a power cut too
        cursor.execute("PRAGMA foreign_keys=ON")
        cursor.close()

    @event.listens_for(engine, "begin")
    def _begun(connection: Connection) -> None:
        # a transaction that first reads and then writes would fail where another one wrote meanwhile
        writes = connection.get_execution_options().get("apportion_writes")
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")

    return engine


def _prepare(store: Store, create: bool, seed: int) -> None:
    """Check the tables, or make them, and read what is kept about the study."""
    with store.writing() if create else store.reading() as connection:
        present = inspect(connection).has_table(schema.meta.name)
        if not present and not create:
            got = f"{store.name}, without rankings"
            fix = "Name the database that `apportion label` was started with."
            raise ConfigError(FIELD, got, "a database of `apportion label`", fix)
        if not present:
            schema.tables.create_all(connection)
            kept = {"version": schema.VERSION, "seed": seed, "secret": secrets.token_hex(32), "lock": 0}
            kept["study"] = secrets.token_hex(4)
            connection.execute(insert(schema.meta), [{"name": n, "value": str(v)} for n, v in kept.items()])
        values = {row.name: row.value for row in connection.execute(select(schema.meta))}
        version = int(values.get("version", "0"))
        if version > schema.VERSION:
            got = f"{store.name} of version {version}"
            fix = "Update apportion; a newer one made this database."
            raise ConfigError(FIELD, got, f"a database of version {schema.VERSION} or older", fix)
        if create:  # fails now where it cannot be written, not at the first ranking
            lock = schema.meta.c.name == "lock"
            connection.execute(schema.meta.update().where(lock).values(value="0"))
    store.seed, store.secret, store.study = int(values["seed"]), values["secret"], values["study"]
