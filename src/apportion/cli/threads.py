"""Torch's threads in a command, chosen before any model is loaded, with warnings on the terminal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from apportion.cli.terminal import note
from apportion.system import cpu
from apportion.training.run_folder import RunFolder


def configure_threads(config: Any = None, stage: str = "") -> cpu.Threads:
    """Set torch's threads as `config.threads` says, and print warnings: a slower run, or numbers that will differ.

    A resumed run of `stage` keeps the number of threads that it began with, because sums are split by threads, unless
    `config.threads` sets another number or there are fewer processors.
    """
    requested = getattr(config, "threads", None)
    threads = cpu.configure_threads(requested)
    for warning in threads.warnings:
        note(f"warning: {warning}")
    if stage:
        run = RunFolder(Path(config.output).expanduser(), stage)
        before = run.read("status.json").get("threads")
        if before not in (None, threads.count) and run.started and not run.finished:
            if requested is None and before <= cpu.allowed_processors():
                note(f"this run began with {before} threads and keeps them ({threads.source}: {threads.count}).")
            else:
                note(
                    f"warning: this run began with {before} threads and continues with {threads.count}: its numbers "
                    f"will not be bitwise those of an uninterrupted run. --threads {before} keeps them."
                )
    return threads
