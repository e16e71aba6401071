"""Uniform credit: every token gets an equal part of the score."""

from __future__ import annotations

from torch import Tensor

from apportion.credit._redistribute import redistributor
from apportion.errors import check_fraction
from apportion.types import Credit, Rollouts


def uniform(*, mix: float = 1.0) -> Credit:
    """Return r_t = (1−β)·r_t + β·Σr/n over a row's n tokens, β = `mix` in [0, 1].

    The baseline of every comparison with ABC. Not causal: the share depends on the final length of the response, so
    with a free EOS its policy gradient is biased towards longer responses when the score is positive.
    Source: Chan et al. 2024 (arXiv 2402.00782), the uniform ablation.

    Raises:
        ConfigError: `mix` outside [0, 1].

    Assumes: every token earned the score equally.
    Use it for: the baseline that every dense credit has to beat; it recovers much of their gain.
    """
    check_fraction("uniform.mix", mix)

    def weights(rollouts: Rollouts) -> Tensor:
        return rollouts.mask.float() / rollouts.mask.sum(dim=1, keepdim=True).clamp_min(1)

    return redistributor(weights, mix=mix, needs=frozenset(), causal=False)
