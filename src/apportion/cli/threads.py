"""Threads and memory of a command: settled before any model is loaded, and told where a person should know of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from apportion.cli.terminal import note
from apportion.system import cpu
from apportion.training.run_folder import RunFolder


def settle(config: Any = None, stage: str = "") -> cpu.Settled:
    """Give torch the threads that `config.threads` says, have freed memory kept, and print what a person should know:
    what may slow the run, or change its last bits.

    A run of `stage` that began with another number of threads goes on with that number, as sums are split otherwise:
    unless `config.threads` says another, or there are not as many processors.
    """
    cpu.keep_memory()
    asked = getattr(config, "threads", None)
    settled = cpu.settle(asked)
    for warning in settled.warnings:
        note(f"warning: {warning}")
    if stage:
        begun = RunFolder(Path(config.output).expanduser(), stage)
        before = begun.read("status.json").get("threads")
        if before not in (None, settled.threads) and begun.started and not begun.finished:
            if asked is None and before <= len(cpu.affinity()):
                note(
                    f"this run began with {before} threads and goes on with them ({settled.source}: {settled.threads})."
                )
            else:
                note(
                    f"warning: this run began with {before} threads and goes on with {settled.threads}: the last bits "
                    f"of its numbers will differ from an uninterrupted run's. --threads {before} keeps them."
                )
    return settled
