"""Every n tokens are an action: the fixed n-grams of MA-RLHF."""

from __future__ import annotations

import torch
from torch import Tensor

from apportion.errors import unknown_name
from apportion.masking import last_index
from apportion.segments._boundaries import Cut, order_in_turn, positive_int
from apportion.types import Rollouts, Segmenter

REPRODUCE = "ma-rlhf-code"


def ngrams(n: int = 5, *, reproduce: str | None = None) -> Segmenter:
    """Return the segmenter that takes `n` tokens at a time, (B,T) int64; what is left at a turn's end is an action.

        12 tokens, n=5: 0 0 0 0 0 1 1 1 1 1 2 2

    n=1 is `tokens`, n ≥ T is `whole_response`. Tokens are counted from the start of their turn, and holes in the mask
    do not count. The paper's n is 5, 10 for code.

    Args:
        n: tokens an action, at least 1.
        reproduce: "ma-rlhf-code" makes each row's last token an action of its own, as the released code does (with
            n=5, 12 tokens: 0 0 0 0 0 1 1 1 1 1 2 3); its empty action, which comes when n divides the tokens before
            the last, is a bug and is not reproduced.

    Raises:
        ConfigError: `n` below 1, or another name to reproduce.

    Source: Chai et al. 2024 (arXiv 2410.02743), section 3.2.1; the released code's `fixed_ngram_selection`.

    Assumes: neighbouring tokens belong to one decision, wherever the cut falls.
    Use it when macro actions are wanted with nothing to parse; n = 5, or 10 for long texts. Compare with `tokens`
    at a matched λ.
    """
    positive_int("ngrams.n", n)
    if reproduce not in (None, REPRODUCE):
        raise unknown_name("ngrams.reproduce", str(reproduce), (REPRODUCE,))

    def starts(rollouts: Rollouts) -> Tensor:
        mask = rollouts.mask
        found = order_in_turn(mask, rollouts.turn) % n == 0
        if reproduce is None:
            return found
        return found | (torch.arange(mask.shape[1], device=mask.device) == last_index(mask)[:, None])

    return Cut(starts)
