"""What a reinforcement-learning run holds between batches, all of it in the checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from apportion.algorithms import Method
from apportion.config import OptimConfig
from apportion.evidence import Models
from apportion.stages.held import Tensors, learned, relearn
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
    ) -> None:
        self.models, self.method, self.prompts = models, method, prompts
        self.needs, self.generator, self.compare, self.once = needs, generator, compare, once
        self.optimizer = make_optimizer(models.policy.trainable(), models.policy.remainders, optim)
        self.credit_state: State = method.credit.init()
        self.clock: dict[str, float] = {}

    def tensors(self) -> Tensors:
        """Return everything that the next batch depends on, for a checkpoint (`held.Held`)."""
        # `models.generator` is the same one, or started anew each step (`sharing.reseed`)
        return learned(self.models.policy.trainable(), self.optimizer) | {
            "state": self.credit_state | {"generator": self.generator.get_state()}
        }

    def restore(self, stored: Tensors) -> None:
        """Take back what `tensors` gave. Raises ConfigError where it is another model's."""
        policy = self.models.policy
        relearn(stored, policy.trainable(), self.optimizer, policy.remainders)
        state = dict(stored["state"])
        self.generator.set_state(state.pop("generator"))
        self.credit_state = state

    def readers(self) -> dict[str, Any]:
        """Return the models whose numbers the run's depend on."""
        policy = self.models.policy
        models = {"policy": policy.model, "reward": self.models.reward.model, "value": policy.value_trunk}
        return {name: model for name, model in models.items() if model is not None}

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
