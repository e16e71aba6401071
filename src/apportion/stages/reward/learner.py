"""The learner of reward-model training: model, optimizer and skipped updates, all checkpointed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from apportion.config import OptimConfig
from apportion.distributed import collectives, sharding
from apportion.distributed.sharding import Sharded, Weights
from apportion.models.master_weights import to_float32, to_sixteen_bit
from apportion.training.nonfinite import SkippedUpdates
from apportion.training.optimizer import make_optimizer
from apportion.training.state import Tensors, pack_state, unpack_state


class RewardLearner:
    """A classifier and its optimizer; excerpts are dealt by the seed, and training draws nothing at random.

    Attributes:
        model: the classifier; its trainable parameters are in `trainable`.
        remainders: of 16-bit weights with float32 masters (`models.master_weights`).
        weights: how they are held, whole or sharded (`distributed.sharding`).
        nonfinite: counts updates that are not finite; `max_skipped` in a row end the run.
    """

    crash_dump = None

    def __init__(self, model: Any, optim: OptimConfig, *, sixteen_bit: bool = False, max_skipped: int = 3) -> None:
        self.model, self.optim, self._sixteen_bit = model, optim, sixteen_bit
        self.trainable = [p for p in model.parameters() if p.requires_grad]
        self.remainders: dict[nn.Parameter, Tensor] = {}
        self.weights = Weights()
        self.nonfinite = SkippedUpdates(max_skipped, "max_skipped")

    @property
    def is_sharded(self) -> bool:
        """Whether each process holds a part of the weights."""
        return self.weights.sharded

    def set_up_sharding(self, abort: Callable[[str], None]) -> None:
        """Broadcast the main process's weights, convert them to 16 bit, and shard them, each where it is asked for."""
        collectives.broadcast(self.trainable)
        if self._sixteen_bit:
            self.remainders = to_sixteen_bit(self.model)
            self.trainable = [p for p in self.model.parameters() if p.requires_grad]
        if sharding.is_requested():
            self.weights = Sharded(
                [self.model], self.trainable, self.remainders, sharding.reshard_after_forward(), abort
            )
            self.trainable = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = make_optimizer(self.weights.local_parameters(self.trainable), self.remainders, self.optim)

    def broadcast_weights(self) -> None:
        """Do nothing: every process resumes from the same files, and the start was broadcast."""

    def gather_weights(self) -> None:
        """Gather the weights in the main process in float32, to be saved; nothing is trained after this."""
        self.weights.unshard_for_saving(self.model, self.remainders)
        to_float32(self.remainders)

    def state_dict(self) -> Tensors:
        """Return everything that the next batch depends on."""
        packed = pack_state(self.weights.local_parameters(self.trainable), self.optimizer)
        return self.weights.gather_state(packed) | {"skips": self.nonfinite.state}

    def load_state_dict(self, stored: Tensors) -> None:
        """Restore what `state_dict` returned. Raises ConfigError where it is another model's."""
        unpack_state(
            self.weights.shard_state(stored),
            self.weights.local_parameters(self.trainable),
            self.optimizer,
            self.remainders,
        )
        self.nonfinite.load_state(stored["skips"])

    def release(self) -> None:
        """Drop the model and the optimizer, for their memory: nothing is trained after this."""
        del self.model, self.trainable, self.optimizer, self.weights

    def models_by_name(self) -> dict[str, Any]:
        """Return the model."""
        return {"model": self.model}
