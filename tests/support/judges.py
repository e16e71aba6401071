"""Judges of answers that tests name in settings: sound ones, and some that fail."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any


def vowels(completions: Sequence[Any], **columns: Any) -> list[float]:
    """Return the number of vowels of each completion."""
    return [float(sum(c in "aeiou" for c in text)) for text in map(text_of, completions)]


def length(completions: Sequence[Any], **columns: Any) -> list[float]:
    """Return the number of characters."""
    return [float(len(text)) for text in map(text_of, completions)]


def sometimes(completions: Sequence[Any], **columns: Any) -> list[float | None]:
    """Return None for completions of an odd number of characters: it does not apply to them."""
    return [None if len(text) % 2 else float(len(text)) for text in map(text_of, completions)]


def never(completions: Sequence[Any], **columns: Any) -> list[None]:
    """Return None for every completion: it applies to none."""
    return [None for _ in completions]


def of_topic(completions: Sequence[Any], topic: Sequence[str]) -> list[float]:
    """Return the length, negative where the prompt's topic is b."""
    return [len(text_of(c)) * (-1.0 if t == "b" else 1.0) for c, t in zip(completions, topic, strict=True)]


def broken(completions: Sequence[Any], **columns: Any) -> list[float]:
    """Fail for completions without a space, while the environment variable BROKEN_JUDGE is set."""
    texts = list(map(text_of, completions))
    if "BROKEN_JUDGE" in os.environ and any(" " not in text for text in texts):
        raise RuntimeError("the judge is out")
    return [0.0 for _ in texts]


def too_few(completions: Sequence[Any], **columns: Any) -> list[float]:
    """Return one number fewer than there are completions."""
    return [0.0 for _ in completions[1:]]


def nan(completions: Sequence[Any], **columns: Any) -> list[float]:
    """Return a NaN for the last completion."""
    return [*[0.0 for _ in completions[:-1]], float("nan")]


def text_of(completion: Any) -> str:
    """Return a completion as text, that of a conversation too."""
    return completion if isinstance(completion, str) else str(completion[0]["content"])
