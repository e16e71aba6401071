"""One forward of the reference: the policy with its adapters disabled, or its frozen copy."""

from __future__ import annotations

from torch import Tensor

from apportion.models.policy import Policy
from apportion.types import Rollouts


def reference_pass(policy: Policy, rollouts: Rollouts) -> dict[str, Tensor]:
    """Return {"reference_logprobs": (B,T)} of the sampled tokens, nats."""
    return {"reference_logprobs": policy.reference_logprobs(rollouts)}
