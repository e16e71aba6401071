"""What a reinforcement-learning run holds between batches, all of it in the checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from apportion.config import OptimConfig
from apportion.config.monitors import MonitorsConfig
from apportion.distributed import collectives, sharding
from apportion.evidence import Models
from apportion.generation.prompts import PromptStream
from apportion.stages.doctor import Finding
from apportion.training.monitoring import Monitors
from apportion.training.optimizer import make_optimizer
from apportion.training.state import Tensors, learned, relearn
from apportion.types import Credit, Method, Rollouts, State
from apportion.user_code import means


class Learner:
    """Models, optimizer, controllers and randomness of one run.

    Attributes:
        models: policy and reward model. method: the three choices. prompts: where prompts come from.
        needs: all evidence to produce. generator: the run's only randomness after loading.
        compare: credits whose rewards are logged beside the one that is trained.
        once: each rollout is learned from once, in one step: the update says what the policy said before it.
        optim: the optimizer's settings. clock: seconds of the current batch by phase.
        monitors: what monitors over the run. findings: what the check-up before the models were loaded warned of.
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
        monitors: MonitorsConfig | None = None,
        findings: Sequence[Finding] = (),
    ) -> None:
        self.models, self.method, self.prompts = models, method, prompts
        self.needs, self.generator, self.compare, self.once = needs, generator, compare, once
        self.findings, self.optim = findings, optim
        self.optimizer = make_optimizer(models.policy.trainable(), models.policy.remainders, optim)
        self.credit_state: State = method.credit.init()
        self.clock: dict[str, float] = {}
        specs = {**method.specs, "compare": list(compare), "needs": needs}
        self.monitors = Monitors(monitors or MonitorsConfig(), models.users, models.policy.tokenizer, specs)

    def share_weights(self, end: Callable[[str], None]) -> None:
        """Have each process keep a part of the weights where the launcher asks for it; before anything is learned.

        Args:
            end: ends this process with an error of another's that left it waiting.
        """
        if sharding.asked():
            policy = self.models.policy
            collectives.broadcast(policy.trainable())
            policy.shard(sharding.again(), end)
            self.optimizer = make_optimizer(policy.learning(), policy.remainders, self.optim)

    @property
    def parted(self) -> bool:
        """Whether each process holds a part of what is learned (`held.Held`)."""
        return self.models.policy.weights.sharded

    def tensors(self) -> Tensors:
        """Return everything that the next batch depends on, for a checkpoint (`held.Held`)."""
        # `models.generator` is the same one, or started anew each step (`sharing.reseed`)
        policy = self.models.policy
        return policy.weights.join(learned(policy.learning(), self.optimizer)) | {
            "state": self.credit_state | {"generator": self.generator.get_state()},
            "monitors": self.monitors.state,
        }

    def restore(self, stored: Tensors) -> None:
        """Take back what `tensors` gave. Raises ConfigError where it is another model's."""
        policy = self.models.policy
        relearn(policy.weights.cut(stored), policy.learning(), self.optimizer, policy.remainders)
        state = dict(stored["state"])
        self.generator.set_state(state.pop("generator"))
        self.credit_state = state
        self.monitors.restore(stored["monitors"])

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
        metrics = means(self.method.specs, "credit", sums)
        if method.update is not None:
            self.credit_state = method.update(self.credit_state, sums)
        coefficients = self.kl_coefficients()
        return metrics | ({"kl/coef": float(sum(coefficients))} if coefficients else {})

    def kl_coefficients(self) -> list[Tensor]:
        """Return κ of every KL penalty in the chain (one at most, as the refusal table says)."""
        return [self.credit_state[key] for key in self._kl_keys()]

    def raise_kl_coef(self, factor: float, most: float) -> bool:
        """Multiply κ by `factor`, to at most `most` times what it began with; return whether it rose."""
        rose = False
        for key in self._kl_keys():
            now, start = self.credit_state[key], self.method.credit.init()[key]
            risen = torch.maximum(now, torch.minimum(now * factor, start.to(now) * most))
            self.credit_state = self.credit_state | {key: risen}
            rose = rose or bool(risen > now)
        return rose

    def _kl_keys(self) -> list[str]:
        chain = enumerate(self.method.specs["credit"])  # `chain` puts the position before a state's key
        return [f"{i}.coef" for i, spec in chain if "kl_penalty" in spec]
