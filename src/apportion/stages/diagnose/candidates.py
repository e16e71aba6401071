"""The methods that a diagnosis compares: a credit on its own, or a whole named algorithm."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from apportion import advantages, algorithms, credit, registry, segments
from apportion.errors import ConfigError, unknown_name
from apportion.evidence import plan
from apportion.stages.diagnose.gradients import leave_one_out_baseline, reward_to_go
from apportion.types import Credit, Estimator, PolicyLoss, Rollouts, Segmenter
from apportion.user_code import guard_credit


class Candidate(NamedTuple):
    """One method of a comparison: its credit without a KL penalty, its actions, its estimator and a named one's loss.

    Without a loss a token's advantage is its weight.
    """

    credit: Credit
    segment: Segmenter
    estimate: Estimator
    loss: PolicyLoss | None = None

    @property
    def needs(self) -> frozenset[str]:
        """Return the evidence that a model has to give; the values are a baseline that is made here."""
        needed = self.credit.needs | self.segment.needs | self.estimate.needs
        return needed - {"values", "credit_share", "bootstrap_values"}

    @property
    def in_score_units(self) -> bool:
        """Whether its gradient has the score's length: dividing by a group's deviation gives it another."""
        return not getattr(self.estimate, "std", False)

    def advantages(self, rollouts: Rollouts) -> tuple[Tensor, Tensor]:
        """Return (the weight of each token's ∇ log π, rewards), both (B,T).

        The values are those of a critic that knows the position alone: the mean reward-to-go of the prompt's other
        rollouts there. It depends on no action of the row, so it does not move the expected gradient at λ = 1.
        """
        rewards, _ = credit.apply(self.credit, rollouts)
        returns = reward_to_go(rewards, rollouts.mask)
        values = returns - leave_one_out_baseline(returns, rollouts.mask, rollouts.group)
        given = {"values": values}
        if self.credit.share is not None:
            given["credit_share"] = self.credit.share(rollouts)
        segments = self.segment(rollouts)
        found = self.estimate(rewards, segments, rollouts.with_evidence(**given)).advantages
        return (found if self.loss is None else step_weights(self.loss, found, segments, rollouts)), rewards


def step_weights(loss: PolicyLoss, advantages: Tensor, segments: Tensor, rollouts: Rollouts) -> Tensor:
    """Return the weight (B,T) of each token's ∇ log π in the first step of `loss`, −∂loss/∂ log π at ratios of 1.

    So a loss that divides by a response's length does so here. The weights are scaled to the advantages' mean size,
    since a constant in front of a loss acts through the learning rate. The policy is its own reference.
    """
    own = rollouts.with_evidence(reference_logprobs=rollouts.old_logprobs)
    with torch.enable_grad():
        logprobs = rollouts.old_logprobs.detach().clone().requires_grad_()
        total, _ = loss.terms(logprobs, own, advantages, rollouts.mask, segments)
    [gradient] = torch.autograd.grad(total, logprobs)
    weights = torch.where(rollouts.mask, -gradient, 0.0)
    return weights * (advantages.abs().sum() / weights.abs().sum().clamp_min(1e-30))


def candidates(specs: Sequence[Any], lam: float) -> dict[str, Candidate]:
    """Return the methods to compare by name: credits with token-level GAE(1, λ), or named algorithms as they are.

    Raises:
        ConfigError: none at all, an unknown name (it lists both kinds), a bad setting, settings of a named algorithm,
            or a need that no producer gives.
    """
    if not specs:
        raise ConfigError("methods", specs, "at least one credit or named algorithm", "Example: [sparse].")
    found: dict[str, Candidate] = {}
    for spec in specs:
        for name, kwargs in registry.parse("methods", spec):
            label = name if not kwargs else f"{name}({', '.join(f'{k}={v}' for k, v in kwargs.items())})"
            found[label] = _candidate(name, kwargs, lam)
    plan(frozenset[str]().union(*(c.needs for c in found.values())))
    return found


def _candidate(name: str, kwargs: dict[str, Any], lam: float) -> Candidate:
    if name in credit.METHODS or ":" in name:
        return Candidate(guard_credit(name, credit.make(name, kwargs)), segments.tokens(), advantages.gae(lam=lam))
    if name not in algorithms.ALGORITHMS:
        raise unknown_name("methods", name, [*credit.METHODS, *algorithms.ALGORITHMS])
    if kwargs:
        fix = f"A named algorithm is compared as it is: write {name} alone, or a credit with its settings."
        raise ConfigError(f"methods.{name}", next(iter(kwargs)), "no settings", fix)
    method = algorithms.build(name, credit_spec=_without_penalty(name))
    return Candidate(method.credit, method.segment, method.estimate, method.loss)


def _without_penalty(name: str) -> list[Any]:
    """Return an algorithm's credit chain without its KL penalty, which is 0 while the policy is its own reference."""
    pairs = registry.parse("credit", algorithms.ALGORITHMS[name].credit)
    return [{one: kwargs} for one, kwargs in pairs if one != "kl_penalty"]
