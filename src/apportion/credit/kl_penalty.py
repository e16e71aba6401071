"""KL penalty: each token pays κ times its log-ratio to the reference; fixed or adaptive κ."""

from __future__ import annotations

import torch
from torch import Tensor

from apportion.errors import check_number
from apportion.masking import check_finite
from apportion.types import Credit, Rollouts, State


def kl_penalty(*, coef: float = 0.05, target: float | None = None, horizon: float = 10_000) -> Credit:
    """Return r_t − κ·(log π(a_t) − log π_ref(a_t)), the k1 estimate with the log-probs of the policy that sampled.

    Args:
        coef: κ, or its start when adaptive; >= 0.
        target: nats a *sequence* that the adaptive controller holds; None keeps κ fixed.
        horizon: rollouts over which κ can change by a factor of about e^0.2; smaller is quicker.

    Needs evidence "reference_logprobs" (B,T). It is never redistributed, so it comes after a redistributor in a
    chain. State: {"coef": ()}; `update` multiplies κ by 1 + clip(kl/target − 1, ±0.2)·n/horizon once a batch, n the
    batch's rollouts.

    Raises:
        ConfigError: a setting outside its range.
        DataError: "reference_logprobs" absent or not finite on the mask.

    Source: Ziegler et al. 2019 (arXiv 1909.08593), the penalty and its controller.

    Assumes: the reference is worth staying near.
    Use it for: always, in some form, when a learned reward model is trained against.
    """
    for name, value, least in (("coef", coef, 0.0), ("horizon", horizon, 1.0), ("target", target, 1e-6)):
        if value is not None:
            check_number(f"kl_penalty.{name}", value, least)

    def init() -> State:
        return {"coef": torch.tensor(float(coef))}

    def assign(rollouts: Rollouts, rewards: Tensor, state: State) -> tuple[Tensor, State]:
        kl = log_ratio(rollouts)
        paid = rewards.float() - state["coef"].to(kl) * kl
        return torch.where(rollouts.mask, paid, 0.0).to(rewards.dtype), state

    def stats(rollouts: Rollouts, before: Tensor, after: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        rows = rollouts.mask.any(dim=1).sum().float()
        return {"objective/kl": (log_ratio(rollouts).sum(), rows)}

    def update(state: State, sums: dict[str, tuple[Tensor, Tensor]]) -> State:
        total, rows = sums["objective/kl"]
        if target is None or rows == 0:
            return state
        error = (total / rows / target - 1.0).clamp(-0.2, 0.2)
        return {"coef": state["coef"] * (1.0 + error * rows / horizon).to(state["coef"])}

    needs = frozenset({"reference_logprobs"})
    return Credit(init, assign, needs, keeps_return=False, causal=True, stats=stats, update=update)


def log_ratio(rollouts: Rollouts) -> Tensor:
    """Return log π − log π_ref of the sampled tokens, (B,T) float32 nats, 0 off the mask."""
    reference = rollouts.require("reference_logprobs", "Score the rollouts with the reference model.").float()
    ratio = torch.where(rollouts.mask, rollouts.logprobs.float() - reference, 0.0)
    return check_finite("log-ratio", ratio, "Was a banned token sampled?")
