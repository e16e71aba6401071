"""Fixed n-grams of MA-RLHF: every n tokens are an action."""

from __future__ import annotations

from torch import Tensor

from apportion.errors import check_whole, unknown_name
from apportion.masking import is_last
from apportion.segments._boundaries import BoundarySegmenter, order_in_turn
from apportion.types import Rollouts, Segmenter

REPRODUCE = "ma-rlhf-code"


def ngrams(n: int = 5, *, reproduce: str | None = None) -> Segmenter:
    """Return the segmenter that makes every `n` tokens an action, (B,T) int64; the remainder at a turn's end is one.

        12 tokens, n=5: 0 0 0 0 0 1 1 1 1 1 2 2

    n=1 is `tokens`, n ≥ T is `whole_response`. Tokens are counted from the start of their turn, and holes in the mask
    do not count. The paper's n is 5, 10 for code.

    Args:
        n: tokens an action, at least 1.
        reproduce: "ma-rlhf-code" makes each row's last token an action of its own, as the released code does (with
            n=5, 12 tokens: 0 0 0 0 0 1 1 1 1 1 2 3); its empty action, which arises when n divides the tokens before
            the last, is a bug and is not reproduced.

    Raises:
        ConfigError: `n` below 1, or another name to reproduce.

    Source: Chai et al. 2024 (arXiv 2410.02743), section 3.2.1; the released code's `fixed_ngram_selection`.

    Assumes: neighbouring tokens belong to one decision, wherever the boundary falls.
    Use it when macro actions are wanted without a parser; n = 5, or 10 for long texts. Compare with `tokens`
    at a matched λ.
    """
    check_whole("ngrams.n", n, 1, "Count tokens.")
    if reproduce not in (None, REPRODUCE):
        raise unknown_name("ngrams.reproduce", str(reproduce), (REPRODUCE,))

    def starts(rollouts: Rollouts) -> Tensor:
        mask = rollouts.mask
        starts = order_in_turn(mask, rollouts.turn) % n == 0
        if reproduce is None:
            return starts
        return starts | is_last(mask)

    return BoundarySegmenter(starts)
