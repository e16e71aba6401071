"""Exclusive lock of a run folder: one process at a time writes it, and the kernel drops the lock when that one ends."""

from __future__ import annotations

import os
from pathlib import Path

from filelock import FileLock, Timeout

from apportion.errors import ConfigError


def lock_folder(folder: Path) -> tuple[FileLock | None, str | None]:
    """Return (lock, None), or (None, warning) where the folder cannot be locked.

    The lock is held while something refers to it; a process that holds it already gets the same object, a fork of that
    process does not hold it. Its file is `.NAME.lock` beside the folder (beside the target of a link), so that it stays
    when the folder is removed and made again.

    Raises:
        ConfigError: another process holds it.
    """
    real = Path(os.path.realpath(folder))
    # no soft locks: their file would stay behind when the process is killed, and keep the next one out
    lock = FileLock(
        real.parent / f".{real.name}.lock", timeout=0, thread_local=False, is_singleton=True, fallback_to_soft=False
    )
    try:
        real.parent.mkdir(parents=True, exist_ok=True)
        if not lock.is_locked:
            lock.acquire()
    except Timeout:
        fix = "Wait for it, or stop it."
        raise ConfigError("output", str(folder), "a run that no other process is writing", fix) from None
    except OSError as error:
        return None, f"{folder} cannot be locked ({error.strerror}): do not start the same run twice at a time"
    return lock, None
