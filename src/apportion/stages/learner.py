"""What a reinforcement-learning run holds between batches, all of it in the checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from apportion.algorithms import Method
from apportion.config import OptimConfig
from apportion.doctor import Finding
from apportion.evidence import Models
from apportion.stages.prompts import PromptStream
from apportion.stages.update import make_optimizer
from apportion.types import Credit, Rollouts, State


class Learner:
    """Models, optimizer, controllers and randomness of one run.

    Attributes:
        models: policy and reward model. method: the three choices. prompts: where prompts come from.
        needs: all evidence to produce. generator: the run's only randomness after loading.
        compare: credits whose rewards are logged beside the one that is trained.
        once: each rollout is learned from once, in one step: the update says what the policy said before it.
        findings: what the check-up before the models were loaded warned of.
        clock: seconds of the current batch by phase.
    """

    def __init__(
        self,
        models: Models,
        method: Method,
        prompts: PromptStream,
        needs: frozenset[str],
        generator: torch.Generator,
        optim: OptimConfig,
        compare: Mapping[str, Credit],
        once: bool = False,
        findings: Sequence[Finding] = (),
    ) -> None:
        self.models, self.method, self.prompts = models, method, prompts
        self.needs, self.generator, self.compare, self.once = needs, generator, compare, once
        self.findings = findings
        self.optimizer = make_optimizer(models.policy.trainable(), models.policy.remainders, optim)
        self.credit_state: State = method.credit.init()
        self.clock: dict[str, float] = {}

    def move_controllers(self, rollouts: Rollouts, rewards: Tensor) -> dict[str, float]:
        """Update the credit's state once for the batch and return its statistics as means."""
        method = self.method.credit
        if method.stats is None:
            return {}
        sums = method.stats(rollouts, rewards, rewards)
        if method.update is not None:
            self.credit_state = method.update(self.credit_state, sums)
        metrics = {k: float(total / count.clamp_min(1)) for k, (total, count) in sums.items()}
        coefficients = self.kl_coefficients()
        return metrics | ({"kl/coef": float(sum(coefficients))} if coefficients else {})

    def kl_coefficients(self) -> list[Tensor]:
        """Return κ of every KL penalty in the chain (one at most, as the refusal table says)."""
        chain = enumerate(self.method.specs["credit"])  # `chain` puts the position before a state's key
        return [self.credit_state[f"{i}.coef"] for i, spec in chain if "kl_penalty" in spec]
