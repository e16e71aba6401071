"""The server's life: settings to an open database and a page, until a signal ends it."""

from __future__ import annotations

import errno
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import NamedTuple

from apportion.config import LabelConfig
from apportion.data.bad_rows import leaving_out
from apportion.errors import ConfigError, DataError
from apportion.label.items import Item, read_items
from apportion.label.server.access import Access, is_loopback, make_access
from apportion.label.store import Store, add_items, open_store
from apportion.label.store.reading import totals
from apportion.system.paths import local_path

LONGEST_GUIDELINES = 256 * 1024  # bytes
LOOK = 1.0  # seconds between looks at the number of ranked items
STAY = 5.0  # seconds in which the last answer can be undone before the server stops


class Opened(NamedTuple):
    """A study that is ready to be served: database, access, a listening socket, and lines about it."""

    store: Store
    access: Access
    listening: socket.socket
    lines: list[str]


def read_guidelines(path: str | None) -> str:
    """Return the guidelines' text, "" where there are none. Raises ConfigError where the file cannot be shown."""
    if path is None:
        return ""
    file = local_path(path, "guidelines", ConfigError)
    try:
        raw = file.read_bytes()
        text = raw.decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        fix = "Check the path, and save the file as UTF-8."
        raise ConfigError("guidelines", f"{path} ({error})", "a text file in UTF-8", fix) from error
    if len(raw) > LONGEST_GUIDELINES:
        fix = "Shorten it: people read it while they work."
        raise ConfigError("guidelines", f"{path} of {len(raw)} bytes", f"at most {LONGEST_GUIDELINES} bytes", fix)
    return text


def open_study(config: LabelConfig) -> Opened:
    """Open the database, add the items, and listen, in an order in which nothing is left open after an error.

    Raises:
        ConfigError: settings, database or address that cannot be used. DataError: rows that cannot.
    """
    read_guidelines(config.guidelines)
    check_tls(config)
    access = make_access(
        "", "", host=config.host, port=config.port, token=config.token, public_url=config.public_url,
        tls=config.tls_certificate is not None, annotators=config.annotators,
    )  # fmt: skip
    items = [] if config.data is None else _read(config)
    store = open_store(config.database, create=True, seed=config.seed)
    lines = []
    try:
        added = add_items(store, items, overlap=config.overlap, overlap_annotators=config.overlap_annotators)
        numbers = totals(store)
        if not numbers["items"]:
            fix = "Name samples with --data, for example those of `apportion sample`."
            raise DataError("data", "none, and a database without items", "items to rank", fix)
        listening = _listen(config.host, config.port)
    except Exception:
        store.close()
        raise
    port = listening.getsockname()[1]
    access = make_access(
        store.secret, store.study, host=config.host, port=port, token=config.token, public_url=config.public_url,
        tls=config.tls_certificate is not None, annotators=config.annotators,
    )  # fmt: skip
    known = f", {added.known} of the file known already" * bool(added.known)
    shared = f"{numbers['shared']} for several people"
    lines.append(f"{numbers['items']} items in {store.name} ({added.new} new{known}); {shared}")
    if store.seed != config.seed:
        lines.append(f"orders of answers follow seed {store.seed}, which the database was made with")
    if access.public and not access.secure:
        lines.append("warning: token and rankings travel unencrypted; use --tls_certificate, or a proxy with https")
    return Opened(store, access, listening, lines)


def addresses(config: LabelConfig, opened: Opened) -> tuple[str, str]:
    """Return (address of the page, address of its results)."""
    port = opened.listening.getsockname()[1]
    scheme = "https" if config.tls_certificate is not None else "http"
    host = config.host if is_loopback(config.host) else socket.gethostname()
    host = f"[{host}]" if ":" in host else host
    base = (config.public_url or f"{scheme}://{host}:{port}").rstrip("/")
    key = f"?key={opened.access.results_key}" if opened.access.public else ""
    return f"{base}/", f"{base}/results{key}"


def serve(config: LabelConfig, opened: Opened, on_start: Callable[[], None] = lambda: None) -> dict[str, int]:
    """Serve the page until SIGINT or SIGTERM, or until `until_ranked` of the items are ranked; return `totals`.

    Every answer that was acknowledged is in the database.
    """
    os.environ.setdefault("OTEL_SDK_DISABLED", "true")  # fastapi imports an interface for telemetry
    import uvicorn

    from apportion.label.server.app import Study, create_app

    study = Study(config.title, read_guidelines(config.guidelines), config.lease_minutes * 60)
    app = create_app(opened.store, opened.access, study)
    settings = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        limit_concurrency=1000,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=5,
        ssl_certfile=config.tls_certificate,
        ssl_keyfile=config.tls_key,
    )
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # uvicorn ends its requests, then repeats the signal
    on_start()
    server = uvicorn.Server(settings)

    def stop() -> None:
        server.should_exit = True

    watched = nullcontext() if config.until_ranked is None else watching(opened.store, config.until_ranked, stop)
    with closing(opened.store):
        with suppress(KeyboardInterrupt), watched:
            server.run(sockets=[opened.listening])
        return totals(opened.store)


def is_ranked(numbers: dict[str, int], share: float) -> bool:
    """Whether at least `share` of the items, of which `totals` tells, have been ranked by all who are to rank them."""
    return numbers["closed"] >= share * numbers["items"]


@contextmanager
def watching(store: Store, share: float, stop: Callable[[], None]) -> Iterator[None]:
    """Call `stop` when the items have stayed ranked (`is_ranked`) for `STAY` seconds: the last answer may be undone."""
    ended = threading.Event()

    def watch() -> None:
        since: float | None = None
        while not ended.wait(LOOK):
            if not is_ranked(totals(store), share):
                since = None
            elif since is None:
                since = time.monotonic()
            elif time.monotonic() - since >= STAY:
                stop()
                return

    thread = threading.Thread(target=watch, name="until ranked", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _read(config: LabelConfig) -> list[Item]:
    assert config.data is not None
    name = config.database if "://" not in config.database else "labels"
    place = local_path(name, "database", ConfigError)
    with leaving_out(place.parent, config.skip_bad_rows, f"{place.name}.bad_rows.jsonl") as bad:
        return read_items(config.data, bad=bad, split=config.split)


def check_tls(config: LabelConfig) -> None:
    """Raise ConfigError for a certificate or a key that is not there, and for a key without a certificate."""
    for field, path in (("tls_certificate", config.tls_certificate), ("tls_key", config.tls_key)):
        if path is not None and not Path(path).is_file():
            raise ConfigError(field, path, "a PEM file", "Check the path.")
    if config.tls_key is not None and config.tls_certificate is None:
        raise ConfigError("tls_certificate", None, "the certificate of tls_key", "Set both, or none.")


def _listen(host: str, port: int, patience: float = 3.0) -> socket.socket:
    """Return a listening socket; a port that a server just left is waited for."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    until = time.monotonic() + patience
    while True:
        listening = socket.socket(family, socket.SOCK_STREAM)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind((host, port))
            listening.listen(128)
            return listening
        except OSError as error:
            listening.close()
            if time.monotonic() < until and error.errno == errno.EADDRINUSE:
                time.sleep(0.2)
                continue
            reason = error.strerror or str(error)
            fix = "Use another --port, or stop the program that has this one; --host is an address of this machine."
            raise ConfigError("port", f"{host}:{port} ({reason})", "an address and a free port", fix) from error
        except OverflowError as error:
            raise ConfigError("port", port, "a port, 0 to 65535", "Choose one above 1023.") from error
