"""User-supplied rewards and evidence, which runs of the tests import by their path: sound ones and some that fail."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from apportion import Credit, Rollouts
from apportion.errors import ScoreError

CALLS: list[int] = []  # texts of each call of `failing` in this process


def per_token(texts: Sequence[str], rollouts: Rollouts, prompts: Sequence[str]) -> list[list[float]]:
    """Return one number a token: 1 for even ids, 0 for odd ones."""
    return [
        [float(i % 2 == 0) for i in ids[on].tolist()]
        for ids, on in zip(rollouts.response_ids, rollouts.mask, strict=True)
    ]


def of_its_row(texts: Sequence[str], rollouts: Rollouts, prompts: Sequence[str], prompt: Sequence[str]) -> list[float]:
    """Return the length of the text that each rollout's row has in the column prompt, of which it has the beginning."""
    assert all(whole.startswith(begun) for whole, begun in zip(prompt, prompts, strict=True))
    return [float(len(whole)) for whole in prompt]


def failing(texts: Sequence[str], rollouts: Rollouts, prompts: Sequence[str]) -> list[list[float]]:
    """Fail in process 1, at its second batch, while the file named by the environment variable FAIL_WHILE exists."""
    CALLS.append(len(texts))
    if os.environ.get("RANK") == "1" and len(CALLS) == 2 and Path(os.environ["FAIL_WHILE"]).exists():
        raise RuntimeError("the reward service is down")
    return [[0.1 * (i % 3) for i in range(n)] for n in rollouts.mask.sum(dim=1).tolist()]


def lost(models: object, rollouts: Rollouts, texts: Sequence[str]) -> Tensor:
    """Fail where the rollouts of the batch's first prompt are: of several processes in one."""
    if bool((rollouts.group == 0).any()):
        row = int((rollouts.group == 0).int().argmax())
        raise ScoreError("the first prompt", "nothing", "a number", "Ask again.", row=row)
    return rollouts.mask.float()


def needs_lost() -> Credit:
    """Return a credit that leaves the rewards where they are, and needs `lost`."""
    needs = frozenset({"reward_functions:lost"})
    return Credit(dict, lambda rollouts, rewards, state: (rewards, state), needs, True, False)
