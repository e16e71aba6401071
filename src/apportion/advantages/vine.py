"""VinePPO: the value of a state is the mean score of fresh rollouts from it; no critic."""

from __future__ import annotations

import torch
from torch import Tensor

from apportion.advantages._actions import action_rewards, following
from apportion.errors import check_whole
from apportion.masking import check_finite, is_segment_start, segment_sum, spread
from apportion.registry import EvidenceKey
from apportion.types import Advantages, Estimator, Rollouts

VALUES, SAMPLES = "vine_values", 9


def vine(samples: int = SAMPLES) -> Estimator:
    """Return A_k = R_k + V(s_{k+1}) − V(s_k) over actions, V the mean return of fresh rollouts from a state.

    s_k is the state before the first token of action k; V after a row's last action is 0, truncated or not. γ is 1. The
    returns are R_k + V(s_{k+1}).

    Args:
        samples: K >= 1 rollouts a state.

    Needs evidence "vine_values" (B,T), used at each action's first token: `EvidenceKey("vine_values", samples=K)`,
    or the plain name for K = 9. One response costs K·S continuations, S its actions: use few, long actions.

    Raises:
        ConfigError: `samples` not a whole number >= 1. DataError: the evidence absent, or not finite where it is used.

    Source: Kazemnejad et al. 2024 (arXiv 2410.01679).

    Assumes: fresh responses can be generated and scored cheaply.
    Use it when credit must be accurate and generation is fast: it costs `samples` responses an action.
    """
    return _Vine(check_whole("vine.samples", samples, 1, "The paper uses 9."))


class _Vine:
    uses_share = False
    group_wise = False
    critic = False

    def __init__(self, samples: int) -> None:
        self.samples = samples
        self.name = VALUES if samples == SAMPLES else EvidenceKey(VALUES, samples=samples)
        self.needs: frozenset[str] = frozenset({self.name})

    def __call__(self, rewards: Tensor, segments: Tensor, rollouts: Rollouts) -> Advantages:
        values = rollouts.require(self.name, "Produce it in scoring: it samples from every state.").float()
        at_start = torch.where(is_segment_start(segments), values, 0.0)
        check_finite(
            f"evidence[{self.name!r}]", at_start, "Check its producer: every action's first token needs a value."
        )
        values = segment_sum(at_start, segments)
        returns = action_rewards(rewards, segments) + following(values, segments)
        return Advantages(spread(returns - values, segments), spread(returns, segments))
