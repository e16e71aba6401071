"""Number of launched processes, and whether this one prints: read from the launcher, without torch."""

from __future__ import annotations

import os

group_rank: int | None = None  # of this process while a process group is open, set by `collectives`


def launched() -> int:
    """Return how many processes the launcher started, 1 without one; the process group need not be open."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "LOCAL_RANK" in os.environ else 1


def is_log_rank() -> bool:
    """Whether this process prints: the main one, or before a group is open the first one of each machine."""
    return os.environ.get("LOCAL_RANK", "0") == "0" if group_rank is None else group_rank == 0
