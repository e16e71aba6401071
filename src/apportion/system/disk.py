"""Writing where a disk may fill up or a process may die: durable folders, patience, and errors that name the fix."""

from __future__ import annotations

import errno
import os
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError

from apportion.errors import DiskError

T = TypeVar("T")
FULL = (errno.ENOSPC, errno.EDQUOT)
LOOK = 0.5  # seconds between looks at a full disk
AGAIN = 10.0  # seconds after which a write is tried although there seems to be no room: quotas do not show


class explained:  # a context manager
    """Turn a failed write into a DiskError that names the folder and the fix."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        reason = getattr(error, "strerror", None) or str(error)
        if isinstance(error, SafetensorError) and "os error" in reason:  # its writer raises no OSError
            number = re.search(r"os error (\d+)", reason)
            error = OSError(int(number[1]) if number else 0, reason)
        if not isinstance(error, OSError) or isinstance(error, DiskError):
            return
        more = "Free some space, then run the same command again: it goes on from the last checkpoint."
        fixes = {
            **dict.fromkeys(FULL, more),
            errno.EACCES: "Choose a folder you may write to.",
            errno.EROFS: "Choose a folder that is not read-only.",
        }
        fix = fixes.get(error.errno or 0, "Choose another --output.")
        raise DiskError("output", f"{self.path} ({reason})", "a folder to write to", fix) from error


def need_space(path: Path, wanted: int) -> None:
    """Raise DiskError unless `wanted` bytes are free where `path` is or will be."""
    free = shutil.disk_usage(existing(path)).free
    if free < wanted:
        got = f"{path} with {free / 1e6:.0f} MB free"
        fix = "Free some space or choose another --output."
        raise DiskError("output", got, f"at least {wanted / 1e6:.0f} MB for models and checkpoints", fix)


def existing(path: Path) -> Path:
    """Return `path`, or the nearest folder above it that exists."""
    place = path.absolute()
    while not place.exists():
        place = place.parent
    return place


def patiently(
    path: Path,
    work: Callable[[], T],
    *,
    wanted: int,
    seconds: float,
    stop: Callable[[], bool] = lambda: False,
    say: Callable[[str], None] = lambda line: None,
) -> T:
    """Return what `work` does; where the disk of `path` is full, wait for space and do it again.

    Args:
        work: leaves nothing behind where it fails.
        wanted: bytes that it writes.
        seconds: how long to wait in all; 0 does not wait.
        stop: asked now and then; True ends the waiting.

    Raises:
        DiskError: the disk stayed full, or cannot be written to for another reason.
    """
    deadline: float | None = None
    while True:
        try:
            with explained(path):
                done = work()
        except DiskError as error:
            full = isinstance(error.__cause__, OSError) and error.__cause__.errno in FULL
            deadline, first = time.monotonic() + seconds if deadline is None else deadline, deadline is None
            if not full or time.monotonic() >= deadline or stop():
                raise
            if first:
                say(_paused(path, wanted, seconds))
            _wait(path, wanted, deadline, stop)
        else:
            if deadline is not None:
                say(f"apportion: there is space in {path} again: the run goes on.\n")
            return done


def _paused(path: Path, wanted: int, seconds: float) -> str:
    free = shutil.disk_usage(existing(path)).free
    return (
        f"apportion: paused: the disk of {path} is full ({size(free)} free, {size(wanted)} wanted). Free some space "
        f"there and the run goes on by itself. It waits {seconds:.0f} s (--disk_wait), then ends; the last checkpoint "
        "stays.\n"
    )


def _wait(path: Path, wanted: int, deadline: float, stop: Callable[[], bool]) -> None:
    """Return when there is room for `wanted` bytes, when it is time to try anyway, at the deadline, or on `stop`."""
    until = min(deadline, time.monotonic() + AGAIN)
    while True:
        time.sleep(min(LOOK, max(0.0, until - time.monotonic())))
        if stop() or time.monotonic() >= until or shutil.disk_usage(existing(path)).free > wanted + 4096:
            return


def size(count: float) -> str:
    """Return a number of bytes for people."""
    for unit in ("bytes", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"


def sync(path: Path) -> None:
    """Have the disk hold what was written to the file `path`, or the names in the folder `path`."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        # some network and FUSE file systems have no such thing for folders
        if not (path.is_dir() and error.errno in (errno.EINVAL, errno.ENOTSUP, errno.EBADF)):
            raise
    finally:
        os.close(handle)


def place(part: Path, final: Path) -> None:
    """Give the finished folder `part` its name `final`, durably.

    What had that name is moved aside first and removed last, so that a kill at any moment leaves one of the two whole;
    `recover` puts it back where the new one did not come.
    """
    for file in sorted(part.rglob("*")):
        sync(file)
    sync(part)
    old = aside(final)
    if final.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.replace(final, old)
    os.replace(part, final)
    sync(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def aside(final: Path) -> Path:
    """Return the name under which `place` keeps what it replaces."""
    return final.with_name(f"{final.name}.old")


def recover(final: Path) -> None:
    """Finish what a killed `place` began for `final`."""
    old = aside(final)
    if not old.is_dir():
        return
    if final.exists():
        shutil.rmtree(old)
    else:
        os.replace(old, final)
