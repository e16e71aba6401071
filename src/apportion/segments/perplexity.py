"""The perplexity rule of MA-RLHF: an action continues while its perplexity under the reference does not rise."""

from __future__ import annotations

import torch
from torch import Tensor

from apportion.segments._boundaries import BoundarySegmenter, turn_starts
from apportion.types import Rollouts, Segmenter


def perplexity() -> Segmenter:
    """Return the segmenter that starts an action at each token that raises the perplexity of the action so far.

    With x_t = −log π_ref(token t), the perplexity of an action of tokens i..j is exp(mean(x_i..x_j)). Token t joins
    it if x_t ≤ mean(x_i..x_{t−1}), which lowers the perplexity or leaves it; otherwise t starts the next action:

        x           2   1    1.5  3   3   1    2     0
        mean so far 2   1.5  1.5  3   3   7/3  2.25  1.8
        id          0   0    0    1   1   1    1     1

    Each turn starts a new action; holes in the mask are skipped. Rows are independent of one another.

    Needs evidence "reference_logprobs" (B,T), nats. Returns (B,T) int64.

    Raises:
        DataError: it is absent, of another shape, or not finite on the mask.

    Source: Chai et al. 2024 (arXiv 2410.02743), section 3.2.1 and appendix B.4. The released code compares each token's
    perplexity with that of the token before, and takes row 0's boundaries for every row.

    Assumes: tokens that the reference predicts with rising confidence belong to one decision.
    Use it when actions should follow predictability, in any language.
    """
    return BoundarySegmenter(_starts, frozenset({"reference_logprobs"}))


def _starts(rollouts: Rollouts) -> Tensor:
    mask = rollouts.mask
    longest = int(mask.sum(dim=1).max()) if len(mask) else 0
    # each row's tokens without holes between them; time first
    packed = mask.long().argsort(dim=1, descending=True, stable=True)[:, :longest]
    # doubles: sums of a row's float32 numbers are exact in them, so that equal means compare as equal
    surprise = -rollouts.token_evidence("reference_logprobs").double().gather(1, packed).T
    forced = turn_starts(mask, rollouts.turn).gather(1, packed).T
    starts = _new_actions(surprise, forced)
    return torch.zeros_like(mask).scatter_(1, packed, starts.T) & mask


def _new_actions(x: Tensor, forced: Tensor) -> Tensor:
    """Return (T,B) bool, True where x_t (T,B) lies above the mean of its action so far, or `forced` (T,B) is True."""
    pairs = torch.stack([x, torch.ones_like(x)], dim=1)  # (T,2,B): each token's part of its action's sum and size
    against = torch.where(forced, torch.inf, x)
    state = torch.ones_like(pairs[0]) if len(x) else x  # (2,B); the first token is forced, whatever the initial state
    starts = []
    for pair, value in zip(pairs.unbind(), against.unbind(), strict=True):  # a recursion over tokens, all rows at once
        total, size = state.unbind()
        above = torch.addcmul(total, value, size, value=-1) < 0  # x·size > total
        state = torch.where(above, pair, state + pair)
        starts.append(above)
    return torch.stack(starts) if starts else forced
