"""Runs of the command as processes that can be killed: forked from this one, whose libraries are loaded, or anew.

A fork is a process as any other, takes milliseconds instead of seconds to begin, and runs `python -m apportion` from
its first line. It is only taken where no other thread runs.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import runpy
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

LIBRARIES = (
    "pydantic",
    "rich.progress",
    "peft",
    "transformers.models.llama.modeling_llama",
    "apportion.cli.rl",
    "apportion.stages.rl.train",
)


def warm() -> None:
    """Load what a run loads, once, for its forks; on one thread, so that none is there to be lost."""
    import torch

    torch.set_num_threads(1)
    for name in LIBRARIES:
        importlib.import_module(name)


class Process:
    """One command in a process of its own, its output in a file."""

    def __init__(self, words: Sequence[str], said: Path, *, anew: bool = False) -> None:
        self.said, self.code = said, None if anew else 0
        self.began = time.monotonic()
        self.ended: int | None = None
        self._popen: subprocess.Popen[bytes] | None = None
        if anew:
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            command = [sys.executable, "-m", "apportion", *words]
            with said.open("wb") as file:
                self._popen = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, env=environment
                )
            self.pid = self._popen.pid
        else:
            self.pid = os.fork()
            if self.pid == 0:
                _become(words, said)

    def poll(self) -> int | None:
        """Return the exit code, −9 for a killed one, None while it runs."""
        if self.ended is None:
            if self._popen is not None:
                self.ended = self._popen.poll()
            else:
                pid, status = os.waitpid(self.pid, os.WNOHANG)
                self.ended = os.waitstatus_to_exitcode(status) if pid else None
        return self.ended

    def kill(self) -> int:
        """Kill it, and return how it ended: 0 where it was done already."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        return self.wait()

    def wait(self) -> int:
        """Return the exit code when it has ended."""
        while (code := self.poll()) is None:
            time.sleep(0.005)
        return code

    def text(self) -> str:
        """Return what it printed."""
        return self.said.read_text(encoding="utf-8", errors="replace")


def _become(words: Sequence[str], said: Path) -> None:
    """Be the command, in a fork, and end with its exit code."""
    code = 1
    try:
        handle = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        for stream in (1, 2):
            os.dup2(handle, stream)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        sys.argv = ["apportion", *words]
        try:
            runpy.run_module("apportion", run_name="__main__", alter_sys=True)
        except SystemExit as done:
            code = done.code if isinstance(done.code, int) else int(done.code is not None)
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)
