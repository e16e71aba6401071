"""Dr. GRPO: GRPO without its length bias, with one constant denominator for every sequence."""

from __future__ import annotations

from torch import Tensor

from apportion.errors import check_whole
from apportion.losses._ratios import Sums, check_clip, sequences
from apportion.losses.grpo import reference_needs, token_terms
from apportion.types import PolicyLoss, Rollouts


def dr_grpo(clip: float = 0.2, kl_coef: float = 0.0, length: int | None = None) -> PolicyLoss:
    """Return Dr. GRPO's loss: GRPO's token terms summed over a sequence and divided by a constant, not by its length.

    Every token has the same weight, whatever the length of its response. Use it with `group_relative(std=False)`.

    Args:
        clip: ε in [0, 1].
        kl_coef: κ >= 0, as in `grpo`; the paper has none.
        length: the constant L, >= 1: the denominator is L a sequence. The authors' code takes the largest number of
            tokens that a response may have (`sampling.max_new_tokens`). None is L = 1, the plain sum of the paper's
            equation. Never the padded width of a batch, which would make the loss depend on padding. L only scales the
            loss, so it acts through the learning rate, gradient clipping and the weight beside other losses.

    Denominator: L times the sequences with a token on the mask. Source: Liu et al. 2025 (arXiv 2503.20783), section 3.

    Raises:
        ConfigError: a setting outside its range.

    Assumes: every token has the same weight, however long its response.
    Use it when responses may grow: it gives no advantage to length.
    """
    check_clip("dr_grpo.clip", clip, 1.0)
    check_clip("dr_grpo.kl_coef", kl_coef)
    if length is not None:
        check_whole("dr_grpo.length", length, 1, "Use the largest number of new tokens, sampling.max_new_tokens.")
    constant = 1.0 if length is None else float(length)

    def terms(
        logprobs: Tensor, rollouts: Rollouts, advantages: Tensor, mask: Tensor, segments: Tensor
    ) -> tuple[Tensor, Sums]:
        each, sums = token_terms(logprobs, rollouts, advantages, mask, clip, kl_coef)
        return each.sum(), sums

    def denominator(mask: Tensor, segments: Tensor) -> Tensor:
        return constant * sequences(mask, segments)

    return PolicyLoss(terms, denominator, "token", reference_needs(kl_coef))
