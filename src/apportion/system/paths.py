"""Names of files and folders as people give them, made into paths that can be looked at. Standard library only."""

from __future__ import annotations

import os
from pathlib import Path

from apportion.errors import ApportionError


def local_path(name: str, field: str, error: type[ApportionError]) -> Path:
    """Return the path that `name` stands for, `~` being the home folder; whether anything is there is not asked.

    Raises:
        ApportionError: of the kind `error`, where it cannot be looked up: too long, a NUL in it, an unknown user.
    """
    try:
        path = Path(name).expanduser()
        path.lstat()
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return path
    except (OSError, ValueError, RuntimeError) as reason:
        said = getattr(reason, "strerror", None) or str(reason)
        got = name if len(name) <= 80 else f"{name[:60]}… ({len(name)} characters)"
        raise error(field, f"{got} ({said})", "a path of this system", "Check the name.") from reason
    return path


def link_outside(folder: Path) -> Path | None:
    """Return a link somewhere in `folder` that leads out of it, or nowhere; None when there is none.

    `folder` itself may be a link: that is how a run is put on another disk.
    """
    root = os.path.realpath(folder)
    for place, folders, files in os.walk(folder):
        for name in sorted((*folders, *files)):
            path = os.path.join(place, name)
            if not os.path.islink(path):
                continue
            target = os.path.realpath(path)
            if not os.path.exists(target) or os.path.commonpath((root, target)) != root:
                return Path(path)
    return None
