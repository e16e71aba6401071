"""Durable writes: folders replaced atomically, full disks waited for, errors that name the fix."""

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
POLL = 0.5  # seconds between checks of a full disk
RETRY = 10.0  # seconds after which a write is retried although there seems to be no space: quotas do not show


class explain_disk_errors:  # a context manager
    """Turn a failed write in the block into a DiskError that names the folder and the fix."""

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
        more = "Free some space, then run the same command again: it resumes from the last checkpoint."
        fixes = {
            **dict.fromkeys(FULL, more),
            errno.EACCES: "Choose a folder you may write to.",
            errno.EROFS: "Choose a folder that is not read-only.",
        }
        fix = fixes.get(error.errno or 0, "Choose another --output.")
        raise DiskError("output", f"{self.path} ({reason})", "a folder to write to", fix) from error


def require_space(path: Path, wanted: int) -> None:
    """Raise DiskError unless `wanted` bytes are free on the disk of `path`."""
    free = shutil.disk_usage(nearest_existing(path)).free
    if free < wanted:
        got = f"{path} with {free / 1e6:.0f} MB free"
        fix = "Free some space or choose another --output."
        raise DiskError("output", got, f"at least {wanted / 1e6:.0f} MB for models and checkpoints", fix)


def nearest_existing(path: Path) -> Path:
    """Return `path`, or the nearest folder above it that exists."""
    found = path.absolute()
    while not found.exists():
        found = found.parent
    return found


def retry_when_full(
    path: Path,
    work: Callable[[], T],
    *,
    wanted: int,
    seconds: float,
    stop: Callable[[], bool] = lambda: False,
    warn: Callable[[str], None] = lambda line: None,
) -> T:
    """Return `work()`; where the disk of `path` is full, wait for space and retry.

    Args:
        work: leaves nothing on the disk where it fails. wanted: bytes that it writes.
        seconds: how long to wait in all; 0 does not wait. stop: polled; True ends the waiting.
        warn: called with a line when the waiting begins and ends.

    Raises:
        DiskError: the disk stayed full, or cannot be written to for another reason.
    """
    deadline: float | None = None
    while True:
        try:
            with explain_disk_errors(path):
                result = work()
        except DiskError as error:
            full = isinstance(error.__cause__, OSError) and error.__cause__.errno in FULL
            deadline, first = time.monotonic() + seconds if deadline is None else deadline, deadline is None
            if not full or time.monotonic() >= deadline or stop():
                raise
            if first:
                warn(_paused(path, wanted, seconds))
            _wait(path, wanted, deadline, stop)
        else:
            if deadline is not None:
                warn(f"apportion: there is space in {path} again: the run continues.\n")
            return result


def _paused(path: Path, wanted: int, seconds: float) -> str:
    free = shutil.disk_usage(nearest_existing(path)).free
    return (
        f"apportion: paused: the disk of {path} is full ({size(free)} free, {size(wanted)} wanted). Free some space "
        f"there and the run continues by itself. It waits {seconds:.0f} s (--disk_wait), then ends; the last "
        "checkpoint stays.\n"
    )


def _wait(path: Path, wanted: int, deadline: float, stop: Callable[[], bool]) -> None:
    """Return when `wanted` bytes are free, when it is time to retry anyway, at the deadline, or on `stop`."""
    until = min(deadline, time.monotonic() + RETRY)
    while True:
        time.sleep(min(POLL, max(0.0, until - time.monotonic())))
        if stop() or time.monotonic() >= until or shutil.disk_usage(nearest_existing(path)).free > wanted + 4096:
            return


def size(count: float) -> str:
    """Return a number of bytes as text, in bytes, kB, MB or GB."""
    for unit in ("bytes", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"


def sync(path: Path) -> None:
    """Flush the file `path`, or the entries of the folder `path`, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        # some network and FUSE file systems cannot flush folders
        if not (path.is_dir() and error.errno in (errno.EINVAL, errno.ENOTSUP, errno.EBADF)):
            raise
    finally:
        os.close(handle)


def replace_durably(part: Path, final: Path) -> None:
    """Rename the finished folder `part` to `final`, durably.

    A folder of that name is renamed first and removed last, so that a kill at any moment leaves one of the two intact;
    `recover` restores it where the new one did not get its name.
    """
    for file in sorted(part.rglob("*")):
        sync(file)
    sync(part)
    old = backup_of(final)
    if final.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.replace(final, old)
    os.replace(part, final)
    sync(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def backup_of(final: Path) -> Path:
    """Return the name that `replace_durably` gives the folder it replaces."""
    return final.with_name(f"{final.name}.old")


def recover(final: Path) -> None:
    """Finish or undo a `replace_durably` of `final` that was killed."""
    old = backup_of(final)
    if not old.is_dir():
        return
    if final.exists():
        shutil.rmtree(old)
    else:
        os.replace(old, final)
