"""Exclusive lock of a run folder: one process at a time writes it, and the kernel drops the lock when that one ends."""

from __future__ import annotations

import os
import weakref
from contextlib import suppress
from pathlib import Path

from filelock import FileLock, Timeout

from apportion.errors import ConfigError

try:
    import fcntl
except ImportError:  # pragma: no cover (Windows, where filelock has locks of its own)
    fcntl = None  # type: ignore[assignment]


class ReadOnlyLock:
    """flock on a path that can only be read: a lock file of another account, or the folder itself."""

    def __init__(self, handle: int) -> None:
        self.handle = handle

    def close(self) -> None:
        """Drop the lock."""
        handle, self.handle = self.handle, -1
        if handle >= 0:
            with suppress(OSError):
                os.close(handle)

    __del__ = close


_read_only: weakref.WeakValueDictionary[str, ReadOnlyLock] = weakref.WeakValueDictionary()  # by real path


def lock_folder(folder: Path) -> tuple[FileLock | ReadOnlyLock | None, str | None]:
    """Return (lock, None), or (None, warning) where the folder cannot be locked.

    The lock is held while something refers to it; a process that holds it already gets the same object, a fork of that
    process does not hold it. Its file is `.NAME.lock` beside the folder (beside the target of a link), so that it stays
    when the folder is removed and made again; where no file can be written there, the folder itself is locked.

    Raises:
        ConfigError: another process holds it.
    """
    real = Path(os.path.realpath(folder))
    path = real.parent / f".{real.name}.lock"
    # no soft locks: their file would stay behind when the process is killed, and keep the next one out
    lock = FileLock(path, timeout=0, thread_local=False, is_singleton=True, fallback_to_soft=False)
    try:
        real.parent.mkdir(parents=True, exist_ok=True)
        if not lock.is_locked:
            lock.acquire()
    except (Timeout, BlockingIOError):
        raise _held(folder) from None
    except OSError as error:
        read_only = _lock_read_only(folder, path, real)
        if read_only is not None:
            return read_only, None
        return None, f"{folder} cannot be locked ({error.strerror}): do not start the same run twice at a time"
    return lock, None


def _lock_read_only(folder: Path, path: Path, real: Path) -> ReadOnlyLock | None:
    """Return a lock on the lock file or on the folder, opened for reading; None where neither can be locked."""
    if str(real) in _read_only:
        return _read_only[str(real)]
    for place in (path, real) if fcntl is not None else ():
        try:
            handle = os.open(place, os.O_RDONLY)
        except OSError:  # it is not there, or may not be read
            continue
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            raise _held(folder) from None
        except OSError:
            os.close(handle)
            return None
        _read_only[str(real)] = lock = ReadOnlyLock(handle)
        return lock
    return None


def _held(folder: Path) -> ConfigError:
    fix = "Wait for it, or stop it."
    return ConfigError("output", str(folder), "a run that no other process is writing", fix)


def _forget() -> None:
    """In a fork: the locks are the parent's, and end with it."""
    for lock in list(_read_only.values()):
        lock.close()
    _read_only.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
