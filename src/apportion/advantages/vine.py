"""VinePPO: the value of a state is the mean score of fresh rollouts from it; no critic."""

from __future__ import annotations

import torch
from torch import Tensor

from apportion import registry
from apportion.advantages._actions import action_rewards, first_tokens, following
from apportion.errors import ConfigError, DataError
from apportion.masking import segment_sum, spread
from apportion.types import Advantages, Estimator, Rollouts

VALUES, SAMPLES = "vine_values", 9


def vine(samples: int = SAMPLES) -> Estimator:
    """Return A_k = R_k + V(s_{k+1}) − V(s_k) over actions, V the mean return of fresh rollouts from a state.

    s_k is the state before the first token of action k; V after a row's last action is 0, cut off or not. γ is 1. The
    returns are R_k + V(s_{k+1}).

    Args:
        samples: K >= 1 rollouts a state.

    Needs evidence "vine_values" (B,T), read at each action's first token: `registry.ask("vine_values", samples=K)`,
    or its bare name for K = 9. One response costs K·S continuations, S its actions: use few, long actions.

    Raises:
        ConfigError: `samples` not a whole number >= 1. DataError: the evidence absent, or not finite where it is read.

    Source: Kazemnejad et al. 2024 (arXiv 2410.01679).

    Assumes: fresh responses can be written and scored cheaply.
    Use it when credit must be right and generation is fast: it costs `samples` responses an action.
    """
    if isinstance(samples, bool) or not isinstance(samples, int) or samples < 1:
        raise ConfigError("vine.samples", samples, "a whole number >= 1", "The paper uses 9.")
    return _Vine(samples)


class _Vine:
    uses_share = False
    group_wise = False
    critic = False

    def __init__(self, samples: int) -> None:
        self.samples = samples
        self.name = VALUES if samples == SAMPLES else registry.ask(VALUES, samples=samples)
        self.needs: frozenset[str] = frozenset({self.name})

    def __call__(self, rewards: Tensor, segments: Tensor, rollouts: Rollouts) -> Advantages:
        if self.name not in rollouts.evidence:
            got = sorted(rollouts.evidence) or "no evidence"
            fix = "Produce it in scoring: it samples from every state."
            raise DataError(f"evidence[{self.name!r}]", got, "values (B,T)", fix)
        read = torch.where(first_tokens(segments), rollouts.evidence[self.name].float(), 0.0)
        bad = ~torch.isfinite(read).all(dim=1)
        if bad.any():
            row = int(bad.nonzero()[0])
            fix = "Check the producer: every action's first token needs a value."
            raise DataError(f"evidence[{self.name!r}]", read[row].tolist(), "finite", fix, row=row)
        values = segment_sum(read, segments)
        returns = action_rewards(rewards, segments) + following(values, segments)
        return Advantages(spread(returns - values, segments), spread(returns, segments))
