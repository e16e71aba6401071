"""Named disjoint parts of a set of texts, by a hash of the text, so that duplicates fall into the same part."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from typing import TypeVar, overload

from apportion.errors import unknown_name

T = TypeVar("T")

# buckets [from, to) out of 100; the final judge is trained on no text of the reward model's or the policy's training
PARTS: dict[str, tuple[int, int]] = {
    "reward_train": (0, 42),
    "reward_validation": (42, 45),
    "reward_test": (45, 50),
    "judge": (50, 85),
    "rl": (85, 94),
    "evaluate_validation": (94, 97),
    "evaluate_test": (97, 100),
}


def bucket(text: str) -> int:
    """Return 0..99, the same for texts that differ only in white space or upper case, on every machine and version."""
    normal = " ".join(text.lower().split())
    return int.from_bytes(hashlib.sha256(normal.encode()).digest()[:8], "big") % 100


@overload
def part(items: Iterable[str], name: str) -> list[str]: ...
@overload
def part(items: Iterable[T], name: str, *, text: Callable[[T], str]) -> list[T]: ...
def part(items, name, *, text=str):  # type: ignore[no-untyped-def]
    """Return the items whose text falls into the part `name`, in their order.

    Args:
        items: texts, or rows of any kind together with `text`.
        name: one of `PARTS`.
        text: row -> its text.

    Raises:
        ConfigError: an unknown part.
    """
    low, high = bounds(name)
    return [item for item in items if low <= bucket(text(item)) < high]


def bounds(name: str) -> tuple[int, int]:
    """Return the buckets [from, to) of the part `name`.

    Raises:
        ConfigError: an unknown part.
    """
    if name not in PARTS:
        raise unknown_name("part", name, PARTS)
    return PARTS[name]
