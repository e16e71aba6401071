"""Programs of a model and their tests, each run in a sandboxed process with limits of time and memory."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from apportion.errors import ScoreError

PROGRAM = Path(__file__).with_name("_sandboxed.py")
START = 10.0  # seconds that the interpreter itself may take to start
MB = 1 << 20
OUTPUT = 1 << 20  # bytes of answers that are read


class NoSandbox(Exception):
    """There is no sandbox on this machine; the text is the reason."""


def passed(
    program: str, tests: Sequence[str], *, seconds: float, memory: float, python: Sequence[str] | None = None
) -> int:
    """Return how many of the `tests` pass after `program` was run, in one sandboxed process.

    A program or test that fails, that ends the process or uses up its limits passes no further test.

    Args:
        seconds: that program and tests may take. memory: megabytes of address space.
        python: a command that runs Python in another sandbox (docker, say), in place of the built-in one.

    Raises:
        NoSandbox: the process was not locked in, so nothing was run.
    """
    token = secrets.token_hex(16)
    request = {"program": program, "tests": list(tests), "token": token, "lock": python is None}
    request |= {"memory": int(memory * MB), "seconds": seconds}
    source = [str(PROGRAM)] if python is None else ["-c", PROGRAM.read_text(encoding="utf-8")]
    command = [*([sys.executable] if python is None else python), "-I", "-B", *source]
    environment = {"PATH": os.environ.get("PATH", ""), "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    with tempfile.TemporaryFile() as answers:  # not a pipe: a process that is killed leaves what it wrote
        try:
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=answers, stderr=subprocess.PIPE, env=environment, cwd="/",
                start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            raise NoSandbox(f"{command[0]} cannot be started: {error.strerror}") from error
        try:
            _, errors = process.communicate(json.dumps(request).encode(), timeout=START + seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            _, errors = process.communicate()
        answers.seek(0)
        lines = answers.read(OUTPUT).decode(errors="replace").splitlines()
    own = [line.removeprefix(f"{token} ") for line in lines if line.startswith(f"{token} ")]
    if own[:1] != ["ready"]:
        reason = own[0].removeprefix("refused ") if own else errors.decode(errors="replace").strip()[-200:]
        raise NoSandbox(reason or "the process ended before it was locked in")
    return len({line for line in own[1:] if line.isdigit() and int(line) < len(tests)})


def checked(program: str, tests: Sequence[str], row: int, **limits: object) -> int:
    """Return `passed` for rollout `row`. Raises ScoreError that names it where there is no sandbox."""
    try:
        return passed(program, tests, **limits)  # type: ignore[arg-type]
    except NoSandbox as error:
        fix = "Nothing was run, and nothing became a reward: see docs/rewards.md for the sandbox."
        raise ScoreError("sandbox of rule tests", str(error), "a process that is locked in", fix, row=row) from error
