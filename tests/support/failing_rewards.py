"""A user's process rewards that fail in one process, at its second batch, while the file named by the environment
is there."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

CALLS = []


def rewards(texts: list[str], rollouts: Any, prompts: list[str]) -> list[list[float]]:
    CALLS.append(len(texts))
    if os.environ.get("RANK") == "1" and len(CALLS) == 2 and Path(os.environ["FAIL_WHILE"]).exists():
        raise RuntimeError("the reward service is down")
    return [[0.1 * (i % 3) for i in range(n)] for n in rollouts.mask.sum(dim=1).tolist()]
