"""A PostgreSQL server of its own in a temporary folder, as a user that is not root, or the reason why there is none."""

from __future__ import annotations

import os
import pwd
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

BINARIES = Path("/usr/lib/postgresql/15/bin")  # of Debian's package postgresql-15
SETTINGS = "-c listen_addresses='' -c fsync=on -c max_connections=200"


def absent() -> str | None:
    """Return why no server can be started, None where one can."""
    if not (BINARIES / "initdb").is_file():
        return f"PostgreSQL 15 is not in {BINARIES}"
    try:
        import psycopg  # noqa: F401
    except ImportError:
        return "psycopg is not installed"
    if os.geteuid() == 0 and not any(entry.pw_name == "postgres" for entry in pwd.getpwall()):
        return "root cannot run PostgreSQL, and there is no user postgres"
    return None


@contextmanager
def server() -> Iterator[str]:
    """Start a server; yield the URL of an empty database. Its socket and its data are in a folder that is removed."""
    with tempfile.TemporaryDirectory(prefix="apportion-postgresql-") as name:
        folder = Path(name)
        if os.geteuid() == 0:
            os.chown(folder, pwd.getpwnam("postgres").pw_uid, -1)
        data, port = folder / "data", _free_port()
        _run(folder, "initdb", "-D", str(data), "-U", "postgres", "-A", "trust", "-E", "UTF8", "--no-sync")
        options = f"{SETTINGS} -c unix_socket_directories={folder} -p {port}"
        _run(folder, "pg_ctl", "-D", str(data), "-w", "-l", str(folder / "log"), "-o", options, "start")
        try:
            _run(folder, "createdb", "-h", str(folder), "-p", str(port), "-U", "postgres", "labels")
            yield f"postgresql://postgres@/labels?host={folder}&port={port}"
        finally:
            _run(folder, "pg_ctl", "-D", str(data), "-m", "immediate", "stop")


def _run(folder: Path, program: str, *arguments: str) -> None:
    command = [str(BINARIES / program), *arguments]
    user = "postgres" if os.geteuid() == 0 else None
    # output to a file: the server inherits it, and a pipe would stay open
    with (folder / "output").open("ab") as output:
        done = subprocess.run(command, user=user, group=user, cwd=folder, stdout=output, stderr=output, timeout=120)
    if done.returncode:
        raise RuntimeError(f"{program}: {(folder / 'output').read_text()}")


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])
