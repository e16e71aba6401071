"""The parsing rule of MA-RLHF: every phrase of the parsed response is an action."""

from __future__ import annotations

from torch import Tensor

from apportion.errors import check_whole
from apportion.registry import EvidenceKey
from apportion.segments._boundaries import BoundarySegmenter, boundary_flags
from apportion.types import Rollouts, Segmenter

MAX_TOKENS = 5


def parsed(max_tokens: int = MAX_TOKENS) -> Segmenter:
    """Return the segmenter that starts an action on each phrase's first token, (B,T) int64.

    The parse tree of each sentence is traversed depth first: a phrase of at most `max_tokens` tokens is one action, a
    longer one is split into its parts, and a part of a single word joins the action before it (the paper's rule, so an
    action can be longer than `max_tokens`).

    Args:
        max_tokens: the paper's cutoff C, at least 1; 5 in its experiments.

    Needs evidence "phrase_boundaries" (B,T) bool, True on each phrase's first token. apportion produces it with a
    dependency parser for English (`pip install apportion[parsed]`; see `apportion.evidence.text.phrases`), and counts
    the rows that fall back to n-grams in "phrase_fallback". Where it is absent, user-supplied evidence "boundaries" is
    used.

    Raises:
        ConfigError: `max_tokens` below 1. DataError: both are absent, or it is not bool (B,T).

    Source: Chai et al. 2024 (arXiv 2410.02743), section 3.2.1 and appendix B.4.

    Assumes: a phrase is one decision; the text is English.
    Use it when linguistic phrases are wanted and the parser's time is affordable.
    """
    check_whole("parsed.max_tokens", max_tokens, 1, "Count tokens.")
    settings = {} if max_tokens == MAX_TOKENS else {"max_tokens": max_tokens}
    name = EvidenceKey("phrase_boundaries", **settings)

    def starts(rollouts: Rollouts) -> Tensor:
        return boundary_flags(rollouts, name)

    return BoundarySegmenter(starts, frozenset({name}))
