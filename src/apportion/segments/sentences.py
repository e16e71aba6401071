"""Sentences as actions."""

from __future__ import annotations

from torch import Tensor

from apportion.segments._boundaries import BoundarySegmenter, boundary_flags
from apportion.types import Rollouts, Segmenter

NAME = "sentence_boundaries"


def sentences() -> Segmenter:
    """Return the segmenter that starts an action on each sentence's first token, (B,T) int64.

    Needs evidence "sentence_boundaries" (B,T) bool, True on each sentence's first token; apportion produces it from
    the response's text (see `apportion.evidence.text.sentences`). Where it is absent, user-supplied evidence
    "boundaries" is used.

    Raises:
        DataError: both are absent, or it is not bool (B,T).

    Assumes: a sentence is one decision.
    Use it for: long answers, and the states of `vine`.
    """

    def starts(rollouts: Rollouts) -> Tensor:
        return boundary_flags(rollouts, NAME)

    return BoundarySegmenter(starts, frozenset({NAME}))
