"""What a reward model's training holds between batches, all of it in the checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from apportion.config import OptimConfig
from apportion.distributed import sharding
from apportion.distributed.sharding import Sharded, Weights
from apportion.models.master_weights import to_float32
from apportion.training.nonfinite import SkippedUpdates
from apportion.training.optimizer import make_optimizer
from apportion.training.state import Tensors, learned, relearn


class RewardLearner:
    """A model and its optimizer; the excerpts are dealt by the seed, and nothing is drawn while it trains.

    Attributes:
        model: with parameters that learn, in `trainable`.
        remainders: of weights that learn in 16 bit (`models.masters`).
        weights: how they are kept, whole or in parts (`models.sharded`).
        skips: counts updates that are not finite, `max_skipped` of which in a row end the run.
    """

    def __init__(
        self, model: Any, remainders: dict[nn.Parameter, Tensor], optim: OptimConfig, max_skipped: int = 3
    ) -> None:
        self.model, self.remainders, self.optim = model, remainders, optim
        self.trainable = [p for p in model.parameters() if p.requires_grad]
        self.weights = Weights()
        self.optimizer = make_optimizer(self.trainable, remainders, optim)
        self.skips = SkippedUpdates(max_skipped, "max_skipped")

    @property
    def parted(self) -> bool:
        """Whether each process holds a part of what is learned (`held.Held`)."""
        return self.weights.sharded

    def share_weights(self, end: Callable[[str], None]) -> None:
        """Have each process keep a part of the weights where the launcher asks for it; before anything is learned.

        Args:
            end: ends this process with an error of another's that left it waiting.
        """
        if sharding.asked():
            self.weights = Sharded([self.model], self.trainable, self.remainders, sharding.again(), end)
            self.trainable = [p for p in self.model.parameters() if p.requires_grad]
            self.optimizer = make_optimizer(self.weights.learning(self.trainable), self.remainders, self.optim)

    def make_whole(self) -> None:
        """Have the weights whole and in float32 in the main process, to be saved; nothing is learned after."""
        self.weights.make_whole(self.model, self.remainders)
        to_float32(self.remainders)

    def tensors(self) -> Tensors:
        """Return everything that the next batch depends on (`held.Held`)."""
        held = learned(self.weights.learning(self.trainable), self.optimizer)
        return self.weights.join(held) | {"skips": self.skips.state}

    def restore(self, stored: Tensors) -> None:
        """Take back what `tensors` gave. Raises ConfigError where it is another model's."""
        relearn(self.weights.cut(stored), self.weights.learning(self.trainable), self.optimizer, self.remainders)
        if "skips" in stored:  # else it was written before updates were skipped
            self.skips.restore(stored["skips"])

    def release(self) -> None:
        """Give up the model and the optimizer, for their memory: nothing is learned from then on."""
        del self.model, self.trainable, self.optimizer, self.weights

    def readers(self) -> dict[str, Any]:
        """Return the model."""
        return {"model": self.model}
