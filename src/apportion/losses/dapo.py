"""DAPO: an asymmetric clip, equal weight of every token, and a soft penalty on overlong responses."""

from __future__ import annotations

from torch import Tensor

from apportion.errors import ConfigError
from apportion.losses._ratios import Sums, check_clip, tokens
from apportion.losses.ppo import clipped_tokens
from apportion.types import PolicyLoss, Rollouts


def dapo(clip_low: float = 0.2, clip_high: float = 0.28) -> PolicyLoss:
    """Return DAPO's loss: max(−A·ρ, −A·clip(ρ, 1−ε_low, 1+ε_high)) a token, over all tokens of the batch, without KL.

    Args:
        clip_low: ε_low in [0, 1].
        clip_high: ε_high >= 0; above ε_low it lets the probability of unlikely tokens grow.

    Denominator: tokens. The overlong ramp is `overlong_penalty`, a part of the reward. Source: Yu et al. 2025
    (arXiv 2503.14476) eq. 8.

    Raises:
        ConfigError: a bound outside its range.

    Assumes: the probability of unlikely tokens should be able to grow.
    Use it when entropy falls too fast under a symmetric clip.
    """
    check_clip("dapo.clip_low", clip_low, 1.0)
    check_clip("dapo.clip_high", clip_high)

    def terms(
        logprobs: Tensor, rollouts: Rollouts, advantages: Tensor, mask: Tensor, segments: Tensor
    ) -> tuple[Tensor, Sums]:
        return clipped_tokens(logprobs, rollouts.old_logprobs, advantages, mask, clip_low, clip_high)

    return PolicyLoss(terms, tokens, "token")


def overlong_penalty(lengths: Tensor, limit: int, buffer: int) -> Tensor:
    """Return the penalty to add to the scores of responses of `lengths` (B,) tokens, (B,) float32 in [−1, 0].

    0 up to `limit` − `buffer` tokens, then a linear ramp down to −1 at `limit`, and −1 beyond.
    Source: Yu et al. 2025 (arXiv 2503.14476) eq. 13, with L_max = `limit` and L_cache = `buffer`.

    Raises:
        ConfigError: not 1 <= buffer <= limit.
    """
    if not 1 <= buffer <= limit:
        got = f"limit {limit}, buffer {buffer}"
        raise ConfigError("overlong_penalty", got, "1 <= buffer <= limit", "DAPO used 20480 and 4096.")
    return ((limit - buffer - lengths.float()) / buffer).clamp(-1.0, 0.0)
