"""Resident memory of this process and its children, and its peak while a block runs."""

from __future__ import annotations

import threading
from types import TracebackType

import psutil

INTERVAL = 0.25  # seconds between samples


class PeakMemory:
    """Context manager: `with PeakMemory() as memory: ...`, then `memory.peak_mb` (MB, process tree)."""

    def __init__(self) -> None:
        self.peak_mb = 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def _sample(self) -> None:
        process = psutil.Process()
        while True:
            self.peak_mb = max(self.peak_mb, tree_mb(process))
            if self._stop.wait(INTERVAL):
                return


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out: a GPU's, Python's, or the plain RuntimeError of torch on a CPU."""
    kind = type(error).__name__ == "OutOfMemoryError" or isinstance(error, MemoryError)
    return kind or (isinstance(error, RuntimeError) and "allocate memory" in str(error))


def tree_mb(process: psutil.Process) -> float:
    """Return the resident memory of `process` and its living descendants, MB."""
    total = 0
    for one in (process, *process.children(recursive=True)):
        try:
            total += one.memory_info().rss
        except (psutil.NoSuchProcess, psutil.ZombieProcess):  # pragma: no cover (it ended since it was listed: chance)
            continue
    return total / 1e6


def memory_mb() -> float:
    """Return this process's resident memory, MB."""
    return psutil.Process().memory_info().rss / 1e6
