"""Paths from names that users give, and links that lead out of a folder."""

from __future__ import annotations

import os
from pathlib import Path

from apportion.errors import ApportionError


def local_path(name: str, field: str, error: type[ApportionError]) -> Path:
    """Return the path of `name`, with `~` expanded; it need not exist.

    Raises:
        ApportionError: of class `error`, where it is no valid path: too long, with a NUL, of an unknown user.
    """
    try:
        path = Path(name).expanduser()
        path.lstat()
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return path
    except (OSError, ValueError, RuntimeError) as reason:
        message = getattr(reason, "strerror", None) or str(reason)
        got = name if len(name) <= 80 else f"{name[:60]}… ({len(name)} characters)"
        raise error(field, f"{got} ({message})", "a path of this system", "Check the name.") from reason
    return path


def link_outside(folder: Path) -> Path | None:
    """Return a link in `folder` whose target is outside it or does not exist; None when there is none.

    `folder` itself may be a link: so a run can be put on another disk.
    """
    root = os.path.realpath(folder)
    for parent, folders, files in os.walk(folder):
        for name in sorted((*folders, *files)):
            path = os.path.join(parent, name)
            if not os.path.islink(path):
                continue
            target = os.path.realpath(path)
            if not os.path.exists(target) or os.path.commonpath((root, target)) != root:
                return Path(path)
    return None
