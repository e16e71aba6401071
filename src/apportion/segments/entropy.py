"""Entropy boundaries: an action starts at each token of high policy entropy."""

from __future__ import annotations

from torch import Tensor

from apportion.errors import check_number
from apportion.segments._boundaries import BoundarySegmenter
from apportion.types import Rollouts, Segmenter


def entropy(threshold: float = 1.75) -> Segmenter:
    """Return the segmenter that ends an action before each token whose entropy is above `threshold`, (B,T) int64.

    The entropy of token t is that of the distribution it was sampled from, H(π(·|s_t)): a token sampled where the
    policy is uncertain starts an action, and the tokens that follow from it belong to it.

        threshold 1.75, entropies  .2 1.8 .1 .3 2.5 1.75:  ids 0 1 1 1 2 2

    Args:
        threshold: nats, at least 0; the paper uses 1.75 to 2, by model.

    Needs evidence "entropy" (B,T), nats.

    Raises:
        ConfigError: `threshold` is not a finite number of at least 0. DataError: "entropy" is absent, of another
            shape, or not finite on the mask.

    Source: Yin et al. 2025 (arXiv 2501.02790).

    Assumes: a decision is taken where the policy is uncertain.
    Use it for: long reasoning, where few tokens are uncertain and many follow from them.
    """
    fix = "0 makes almost every token an action; a threshold above log(vocabulary) makes the response one."
    check_number("entropy.threshold", threshold, 0.0, fix)

    def starts(rollouts: Rollouts) -> Tensor:
        return rollouts.token_evidence("entropy") > threshold

    return BoundarySegmenter(starts, frozenset({"entropy"}))
