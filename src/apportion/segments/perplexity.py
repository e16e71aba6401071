"""An action goes on while the reference model finds it ever more likely: the perplexity rule of MA-RLHF."""

from __future__ import annotations

import torch
from torch import Tensor

from apportion.segments.boundaries import Cut, numbers, turn_starts
from apportion.types import Rollouts, Segmenter


def perplexity() -> Segmenter:
    """Return the segmenter that starts an action at each token that raises the perplexity of the action so far.

    With x_t = −log π_ref(token t), the perplexity of an action of tokens i..j is exp(mean(x_i..x_j)). Token t joins
    it if x_t ≤ mean(x_i..x_{t−1}), which lowers the perplexity or leaves it; otherwise t starts the next action:

        x           2   1    1.5  3   3   1    2     0
        mean so far 2   1.5  1.5  3   3   7/3  2.25  1.8
        id          0   0    0    1   1   1    1     1

    Each turn starts anew; holes in the mask are stepped over. Every row is cut by its own numbers.

    Needs evidence "reference_logprobs" (B,T), nats. Returns (B,T) int64.

    Raises:
        DataError: it is absent, of another shape, or not finite on the mask.

    Source: Chai et al. 2024 (arXiv 2410.02743), section 3.2.1 and appendix B.4. The released code compares each token's
    perplexity with that of the token before, and takes row 0's boundaries for every row.

    Assumes: tokens that the reference finds ever easier continue what was begun.
    Use it when actions should follow what is predictable, in any language.
    """
    return Cut(_starts, frozenset({"reference_logprobs"}))


def _starts(rollouts: Rollouts) -> Tensor:
    # doubles: sums of a row's float32 numbers are exact in them, so that equal means compare as equal
    mask, surprise = rollouts.mask, -numbers(rollouts, "reference_logprobs").double()
    forced = turn_starts(mask, rollouts.turn)
    out = torch.zeros_like(mask)
    total, size = surprise.new_zeros(len(mask)), surprise.new_zeros(len(mask))
    for t in range(mask.shape[1]):  # a recursion over tokens, all rows at once
        x, on = surprise[:, t], mask[:, t]
        starts = on & (forced[:, t] | (x * size > total))
        total = torch.where(starts, x, torch.where(on, total + x, total))
        size = torch.where(starts, 1.0, size + on)
        out[:, t] = starts
    return out
