"""Runs of the command as processes that can be killed: forks of this process, or new interpreters.

A fork starts in milliseconds instead of seconds, as the libraries are imported already, and executes `python -m
apportion` from its first line. The parent must have a single thread.
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

from benchmarks.harness.environment import environment

LIBRARIES = (
    "pydantic",
    "rich.progress",
    "peft",
    "transformers.models.llama.modeling_llama",
    "apportion.cli.rl",
    "apportion.stages.rl.train",
)


def import_libraries() -> None:
    """Import the libraries of a run once, for its forks; on one thread, as a fork has only one."""
    import torch

    torch.set_num_threads(1)
    for name in LIBRARIES:
        importlib.import_module(name)


class Process:
    """One command in a process of its own, its output in a file.

    Args:
        fork: fork this process instead of starting a new interpreter.
    """

    def __init__(self, words: Sequence[str], output: Path, *, fork: bool = True) -> None:
        self.output = output
        self.began = time.monotonic()
        self.ended: int | None = None
        self._popen: subprocess.Popen[bytes] | None = None
        if fork:
            self.pid = os.fork()
            if self.pid == 0:
                _become(words, output)
        else:
            command = [sys.executable, "-m", "apportion", *words]
            with output.open("wb") as file:
                self._popen = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, env=environment(1)
                )
            self.pid = self._popen.pid

    def poll(self) -> int | None:
        """Return the exit code (−9 if killed), None while it runs."""
        if self.ended is None:
            if self._popen is not None:
                self.ended = self._popen.poll()
            else:
                pid, status = os.waitpid(self.pid, os.WNOHANG)
                self.ended = os.waitstatus_to_exitcode(status) if pid else None
        return self.ended

    def kill(self) -> int:
        """Kill it and return its exit code; 0 where it had finished."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        return self.wait()

    def wait(self) -> int:
        """Wait for the end and return the exit code."""
        while (code := self.poll()) is None:
            time.sleep(0.005)
        return code

    def text(self) -> str:
        """Return its output."""
        return self.output.read_text(encoding="utf-8", errors="replace")


def _become(words: Sequence[str], output: Path) -> None:
    """Execute the command in a forked child and exit with its code."""
    code = 1
    try:
        handle = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
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
