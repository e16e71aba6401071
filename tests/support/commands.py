"""Real commands on tiny models: their results, and processes forked from one that has the libraries imported."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from examples import LONG

SUPPORT = Path(__file__).parent
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}
SHAPE = re.compile(r"apportion: [^\n]+: got [^\n]+; expected [^\n]+\. [^\n]+\n")


@dataclass
class Result:
    """The result of a command: exit code, output, and the model libraries that it loaded."""

    code: int
    out: str
    err: str
    folder: Path
    loaded: tuple[str, ...] | None = None  # None: the process ended before it could report them

    @property
    def loads_nothing(self) -> bool:
        """Whether no model library was loaded; not known of a new process."""
        return self.loaded == () or (LONG and self.loaded is None)

    def assert_refused(self, *pieces: str, before: str = "") -> None:
        """Check exit code 2, one message with all `pieces` after the output `before`, and no finished run."""
        assert self.code == 2, (self.code, self.out, self.err)
        assert "Traceback" not in self.err and self.out == ""
        assert SHAPE.fullmatch(self.err.removeprefix(before)), self.err
        for piece in pieces:
            assert piece in self.err, (piece, self.err)
        assert not [path for path in self.folder.rglob("final") if path.is_dir()]
        assert not [path for path in self.folder.rglob("status.json") if "finished" in path.read_text()]

    def assert_refused_early(self, *pieces: str) -> None:
        """Check `assert_refused`, and that no model library was loaded before the error."""
        self.assert_refused(*pieces)
        assert self.loads_nothing

    def assert_done(self) -> None:
        """Check that the command succeeded."""
        assert self.code == 0 and "Traceback" not in self.err, (self.code, self.err)


class Server:
    """A fork server, and the commands that it runs; `prefix` are the words of a program that starts it: `unshare`."""

    def __init__(self, kind: str, folder: Path, prefix: Sequence[str] = ()) -> None:
        self.folder, self.count = folder, 0
        command = [*prefix, sys.executable, str(SUPPORT / "fork_server.py"), kind]
        self.process = subprocess.Popen(
            command, env=os.environ | ENVIRONMENT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def run(self, *arguments: object, cwd: Path, **environment: str) -> Result:
        """Run `apportion ARGUMENTS` in folder `cwd` and return its result."""
        if LONG:
            return run_python("-m", "apportion", *arguments, cwd=cwd, **environment)
        return self.fork(*arguments, cwd=cwd, **environment)

    def fork(
        self,
        *arguments: object,
        cwd: Path,
        program: str = "apportion",
        largest_file: int | None = None,
        **environment: str,
    ) -> Result:
        """Run `apportion ARGUMENTS` in a fork, also in the long tests: it may be killed, or limited in what it writes.

        `program` may be "file" or "module": then the first argument names a Python program, and the others are its own.
        No file can grow beyond `largest_file` bytes, where it is given.
        """
        limits = {} if largest_file is None else {"largest_file": largest_file}
        return self._request(arguments, program, cwd, environment, [{}], limits)[0]

    def kill(self) -> None:
        """Kill the command that runs now, by SIGKILL."""
        os.kill(int((self.folder / f"{self.count}-0.pid").read_text()), signal.SIGKILL)

    @property
    def errors(self) -> str:
        """What the command that runs now has written to stderr until now."""
        return (self.folder / f"{self.count}-0.err").read_text()

    def pair(self, *arguments: object, cwd: Path, program: str = "apportion", **environment: str) -> list[Result]:
        """Run a `program` with `arguments`, as `fork` does, in two processes with the variables that torchrun sets.

        Returns the results of ranks 0 and 1, each with what its own process wrote.
        """
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in (0, 1)]
        return self._request(arguments, program, cwd, shared | environment, ranks, {})

    def _request(
        self,
        words: Sequence[object],
        program: str,
        cwd: Path,
        environment: dict[str, str],
        processes: list[dict[str, str]],
        limits: dict[str, int],
    ) -> list[Result]:
        self.count += 1
        files = [
            {name: str(self.folder / f"{self.count}-{i}.{name}") for name in ("out", "err", "loaded", "pid")}
            for i in range(len(processes))
        ]
        request: dict[str, Any] = {"argv": [str(w) for w in words], "program": program, "cwd": str(cwd)} | limits
        request["processes"] = [{"env": environment | own} | named for own, named in zip(processes, files, strict=True)]
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        codes = json.loads(self.process.stdout.readline())
        return [result(code, named, cwd) for code, named in zip(codes, files, strict=True)]


def result(code: int, files: dict[str, str], cwd: Path) -> Result:
    """Return what a forked process left in its files."""
    out, err, loaded = (Path(files[name]) for name in ("out", "err", "loaded"))
    known = tuple(json.loads(loaded.read_text())) if loaded.exists() else None
    return Result(code, out.read_text(), err.read_text(), cwd, known)


def run_python(*arguments: object, cwd: Path, timeout: float = 120, **environment: str) -> Result:
    """Run a new Python process and return its result."""
    command, environment = [sys.executable, *map(str, arguments)], os.environ | ENVIRONMENT | environment
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout)
    return Result(done.returncode, done.stdout, done.stderr, cwd)


@contextmanager
def server(kind: str, folder: Path, prefix: Sequence[str] = ()) -> Iterator[Server]:
    """Start a fork server and end it."""
    started = Server(kind, folder, prefix)
    try:
        yield started
    finally:
        assert started.process.stdin is not None
        started.process.stdin.close()
        started.process.wait(timeout=60)
