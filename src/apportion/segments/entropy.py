"""A new action where the policy hesitates: segments between tokens of high entropy."""

from __future__ import annotations

import math

from torch import Tensor

from apportion.errors import ConfigError
from apportion.segments._boundaries import Cut, numbers
from apportion.types import Rollouts, Segmenter


def entropy(threshold: float = 1.75) -> Segmenter:
    """Return the segmenter that ends an action before each token whose entropy is above `threshold`, (B,T) int64.

    The entropy of token t is that of the distribution it was drawn from, H(π(·|s_t)): a token drawn where the policy
    hesitates starts an action, and the tokens that follow from it belong to it.

        threshold 1.75, entropies  .2 1.8 .1 .3 2.5 1.75:  ids 0 1 1 1 2 2

    Args:
        threshold: nats, at least 0; the paper uses 1.75 to 2, by model.

    Needs evidence "entropy" (B,T), nats.

    Raises:
        ConfigError: `threshold` is not a finite number of at least 0. DataError: "entropy" is absent, of another
            shape, or not finite on the mask.

    Source: Yin et al. 2025 (arXiv 2501.02790).

    Assumes: a decision is taken where the policy hesitates.
    Use it for: long reasoning, where few tokens are open and many follow from them.
    """
    number = isinstance(threshold, (int, float)) and not isinstance(threshold, bool)
    if not number or not math.isfinite(threshold) or threshold < 0:
        fix = "0 makes almost every token an action; a threshold above log(vocabulary) makes the response one."
        raise ConfigError("entropy.threshold", threshold, "a finite number of nats, at least 0", fix)

    def starts(rollouts: Rollouts) -> Tensor:
        return numbers(rollouts, "entropy") > threshold

    return Cut(starts, frozenset({"entropy"}))
