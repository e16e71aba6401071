"""One process at a time writes a folder: a lock that the kernel drops when its process ends, however it ends."""

from __future__ import annotations

import os
import weakref
from contextlib import suppress
from pathlib import Path

from apportion.errors import ConfigError

try:
    import fcntl
except ImportError:  # a system without it has no such locks
    fcntl = None  # type: ignore[assignment]


class Lock:
    """Holds the lock of a folder for as long as something refers to it.

    Attributes:
        note: what a person should know of it, None where all is well.
    """

    def __init__(self, handle: int | None, note: str | None = None) -> None:
        self.handle, self.note = handle, note

    def close(self) -> None:
        """Let go of the lock."""
        handle, self.handle = self.handle, None
        if handle is not None:
            with suppress(OSError):
                os.close(handle)

    __del__ = close


_held: weakref.WeakValueDictionary[str, Lock] = weakref.WeakValueDictionary()  # this process's, by real path


def take(folder: Path) -> Lock:
    """Return the lock of `folder`, the same one where this process holds it already.

    It is taken on `.NAME.lock` beside the folder (beside the one that a link leads to), so that it outlives a folder
    that is removed and made anew; where no file can be made there, on the folder itself.

    Raises:
        ConfigError: another process holds it.
    """
    real = os.path.realpath(folder)
    held = _held.get(real)
    if held is None:
        held = _taken(folder, Path(real))
        _held[real] = held
    return held


def _taken(folder: Path, real: Path) -> Lock:
    handle = None if fcntl is None else _open(real)
    if handle is None:  # there is no folder yet either, and it will not be made
        return Lock(None)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        fix = "Wait for it, or stop it."
        raise ConfigError("output", str(folder), "a run that no other process is writing", fix) from None
    except OSError as error:
        os.close(handle)
        return Lock(None, f"{folder} cannot be locked ({error.strerror}): do not start the same run twice at a time")
    return Lock(handle)


def _open(real: Path) -> int | None:
    """Return an open file to lock, None where there is none."""
    beside = real.parent / f".{real.name}.lock"
    with suppress(OSError):
        real.parent.mkdir(parents=True, exist_ok=True)
    # another user's file may be readable only; a network's file systems want it open for writing
    for path, flags in ((beside, os.O_RDWR | os.O_CREAT), (beside, os.O_RDONLY), (real, os.O_RDONLY)):
        with suppress(OSError):
            return os.open(path, flags, 0o666)
    return None


def _forget() -> None:
    """In a fork: the locks are the parent's, and end with it."""
    for lock in list(_held.values()):
        lock.close()
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
