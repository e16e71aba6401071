"""Every phrase is an action, where a producer has parsed the response: the parsing rule of MA-RLHF."""

from __future__ import annotations

from torch import Tensor

from apportion import registry
from apportion.segments._boundaries import Cut, flags, positive_int
from apportion.types import Rollouts, Segmenter

MAX_TOKENS = 5


def parsed(max_tokens: int = MAX_TOKENS) -> Segmenter:
    """Return the segmenter that starts an action on each phrase's first token, (B,T) int64.

    The parse tree of each sentence is walked depth first: a phrase of at most `max_tokens` tokens is one action, a
    longer one is taken apart into its parts, and a part of a single word joins the action before it (the paper's rule,
    so an action can be longer than `max_tokens`).

    Args:
        max_tokens: the paper's cutoff C, at least 1; 5 in its experiments.

    Needs evidence "phrase_boundaries" (B,T) bool, True on each phrase's first token. apportion makes it with a
    dependency parser for English (`pip install apportion[parsed]`); `apportion.evidence.text.phrases` says how, and
    counts the
    rows that fall back to n-grams in "phrase_fallback". Where it is absent, "boundaries" is read, for those who
    bring their own.

    Raises:
        ConfigError: `max_tokens` below 1. DataError: both are absent, or it is not bool (B,T).

    Source: Chai et al. 2024 (arXiv 2410.02743), section 3.2.1 and appendix B.4.

    Assumes: a phrase is one decision; the text is English.
    Use it when phrases matter more than the parser's time.
    """
    positive_int("parsed.max_tokens", max_tokens)
    settings = {} if max_tokens == MAX_TOKENS else {"max_tokens": max_tokens}
    name = registry.ask("phrase_boundaries", **settings)

    def starts(rollouts: Rollouts) -> Tensor:
        return flags(rollouts, name)

    return Cut(starts, frozenset({name}))
