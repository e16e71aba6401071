"""A user's process rewards for the tests: found by its import path, as any user's function is."""

from __future__ import annotations

from collections.abc import Sequence

from apportion import Rollouts


def per_token(texts: Sequence[str], rollouts: Rollouts, prompts: Sequence[str]) -> list[list[float]]:
    """Return one number a token: 1 for even ids, 0 for odd ones."""
    return [
        [float(i % 2 == 0) for i in ids[on].tolist()]
        for ids, on in zip(rollouts.response_ids, rollouts.mask, strict=True)
    ]
