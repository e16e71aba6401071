"""The methods of a diagnosis: single credit methods, or named algorithms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from apportion import advantages, algorithms, credit, registry, segments
from apportion.errors import ConfigError, unknown_name
from apportion.evidence import plan
from apportion.masking import Moments, moments, whiten
from apportion.stages.diagnose.gradients import leave_one_out_baseline, reward_to_go
from apportion.types import Credit, Estimator, PolicyLoss, Rollouts, Segmenter
from apportion.user_code import guard_credit


class Candidate(NamedTuple):
    """One method of a comparison: credit without a KL penalty, segments, estimator, and the loss of a named algorithm.

    Without a loss a token's weight is its advantage.
    """

    credit: Credit
    segment: Segmenter
    estimate: Estimator
    loss: PolicyLoss | None = None

    @property
    def needs(self) -> frozenset[str]:
        """Return the evidence that a model has to provide; values are a baseline computed here."""
        needed = self.credit.needs | self.segment.needs | self.estimate.needs
        return needed - {"values", "credit_share", "bootstrap_values"}

    @property
    def in_score_units(self) -> bool:
        """Whether its gradient has the scale of the score: division by a standard deviation changes it."""
        return not getattr(self.estimate, "std", False) and not self.whitened

    @property
    def whitened(self) -> bool:
        """Whether the update's whitening is its normalisation, so that its runs have it by default."""
        return bool(getattr(self.estimate, "whitened", False))

    def whitening(self, parts: Sequence[Rollouts]) -> Moments | None:
        """Return the moments of its advantages over all tokens of `parts`; None where it is not whitened."""
        if not self.whitened:
            return None
        tokens = torch.cat([self._estimate(part)[0][part.mask] for part in parts])
        return moments(tokens[None], torch.ones_like(tokens[None], dtype=torch.bool))

    def advantages(self, rollouts: Rollouts, whitening: Moments | None = None) -> tuple[Tensor, Tensor]:
        """Return (the weight of each token's ∇ log π, rewards), both (B,T).

        Where it is whitened, so are the advantages: by `whitening`, or by their own moments over these rollouts, as a
        run's update does with a batch.
        """
        estimated, rewards, segments = self._estimate(rollouts)
        if self.whitened:
            estimated = whiten(estimated, rollouts.mask, known=whitening)
        return (estimated if self.loss is None else step_weights(self.loss, estimated, segments, rollouts)), rewards

    def _estimate(self, rollouts: Rollouts) -> tuple[Tensor, Tensor, Tensor]:
        """Return (advantages, rewards, segments), all (B,T), the advantages as the estimator gives them.

        The values are those of a critic that knows only the position: the mean reward-to-go of the prompt's other
        rollouts there. They do not depend on the row's actions, so the expected gradient at λ = 1 is unchanged.
        """
        rewards, _ = credit.apply(self.credit, rollouts)
        returns = reward_to_go(rewards, rollouts.mask)
        values = returns - leave_one_out_baseline(returns, rollouts.mask, rollouts.group)
        extra = {"values": values}
        if self.credit.share is not None:
            extra["credit_share"] = self.credit.share(rollouts)
        segments = self.segment(rollouts)
        estimated = self.estimate(rewards, segments, rollouts.with_evidence(**extra)).advantages
        return estimated, rewards, segments


def step_weights(loss: PolicyLoss, advantages: Tensor, segments: Tensor, rollouts: Rollouts) -> Tensor:
    """Return the weight (B,T) of each token's ∇ log π in the first step of `loss`, −∂loss/∂ log π at ratios of 1.

    So a loss that divides by a response's length does so here. The weights are scaled to the advantages' mean size: a
    constant factor of a loss acts like a learning rate. The reference is the policy itself.
    """
    own = rollouts.with_evidence(reference_logprobs=rollouts.old_logprobs)
    with torch.enable_grad():
        logprobs = rollouts.old_logprobs.detach().clone().requires_grad_()
        total, _ = loss.terms(logprobs, own, advantages, rollouts.mask, segments)
    [gradient] = torch.autograd.grad(total, logprobs)
    weights = torch.where(rollouts.mask, -gradient, 0.0)
    return weights * (advantages.abs().sum() / weights.abs().sum().clamp_min(1e-30))


def candidates(specs: Sequence[Any], lam: float) -> dict[str, Candidate]:
    """Return the methods to compare by name: credits with token-level GAE(1, λ), or unchanged named algorithms.

    Raises:
        ConfigError: none at all, an unknown name (it lists both kinds), a bad setting, settings of a named algorithm,
            or evidence that no producer provides.
    """
    if not specs:
        raise ConfigError("methods", specs, "at least one credit or named algorithm", "Example: [sparse].")
    chosen: dict[str, Candidate] = {}
    for spec in specs:
        for name, kwargs in registry.parse("methods", spec):
            label = name if not kwargs else f"{name}({', '.join(f'{k}={v}' for k, v in kwargs.items())})"
            chosen[label] = _candidate(name, kwargs, lam)
    plan(frozenset[str]().union(*(c.needs for c in chosen.values())))
    return chosen


def _candidate(name: str, kwargs: dict[str, Any], lam: float) -> Candidate:
    if name in credit.METHODS or ":" in name:
        return Candidate(guard_credit(name, credit.make(name, kwargs)), segments.tokens(), advantages.gae(lam=lam))
    if name not in algorithms.ALGORITHMS:
        raise unknown_name("methods", name, [*credit.METHODS, *algorithms.ALGORITHMS])
    if kwargs:
        fix = f"A named algorithm is compared unchanged: write only {name}, or a credit with its settings."
        raise ConfigError(f"methods.{name}", next(iter(kwargs)), "no settings", fix)
    method = algorithms.build(name, credit_spec=_without_penalty(name))
    return Candidate(method.credit, method.segment, method.estimate, method.loss)


def _without_penalty(name: str) -> list[Any]:
    """Return an algorithm's credit chain without its KL penalty, which is 0 where the policy is the reference."""
    pairs = registry.parse("credit", algorithms.ALGORITHMS[name].credit)
    return [{one: kwargs} for one, kwargs in pairs if one != "kl_penalty"]
