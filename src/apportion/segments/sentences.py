"""Every sentence is an action, where a producer has marked the sentences."""

from __future__ import annotations

from torch import Tensor

from apportion.segments._boundaries import Cut, flags
from apportion.types import Rollouts, Segmenter

NAME = "sentence_boundaries"


def sentences() -> Segmenter:
    """Return the segmenter that starts an action on each sentence's first token, (B,T) int64.

    Needs evidence "sentence_boundaries" (B,T) bool, True on each sentence's first token; apportion makes it from the
    response's text (the rule is in `apportion.evidence.text.sentences`). Where it is absent, "boundaries" is read, for
    those who bring their own.

    Raises:
        DataError: both are absent, or it is not bool (B,T).

    Assumes: a sentence is one decision.
    Use it for: long answers, and the states of `vine`.
    """

    def starts(rollouts: Rollouts) -> Tensor:
        return flags(rollouts, NAME)

    return Cut(starts, frozenset({NAME}))
