"""What a reward model's training holds between batches, all of it in the checkpoint."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from apportion.config import OptimConfig
from apportion.stages.held import Tensors, learned, relearn
from apportion.stages.skips import Skips
from apportion.stages.update import make_optimizer


class Trainee:
    """A model and its optimizer; the clips are dealt by the seed, and nothing is drawn while it trains.

    Attributes:
        model: with parameters that learn, in `trainable`.
        remainders: of weights that learn in 16 bit (`models.masters`).
        parted: its weights are whole in every process.
        skips: counts updates that are not finite, `max_skipped` of which in a row end the run.
    """

    parted = False

    def __init__(
        self, model: Any, remainders: dict[nn.Parameter, Tensor], optim: OptimConfig, max_skipped: int = 3
    ) -> None:
        self.model, self.remainders = model, remainders
        self.trainable = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = make_optimizer(self.trainable, remainders, optim)
        self.skips = Skips(max_skipped, "max_skipped")

    def tensors(self) -> Tensors:
        """Return everything that the next batch depends on (`held.Held`)."""
        return learned(self.trainable, self.optimizer) | {"skips": self.skips.state}

    def restore(self, stored: Tensors) -> None:
        """Take back what `tensors` gave. Raises ConfigError where it is another model's."""
        relearn(stored, self.trainable, self.optimizer, self.remainders)
        if "skips" in stored:  # else it was written before updates were skipped
            self.skips.restore(stored["skips"])

    def release(self) -> None:
        """Give up the model and the optimizer, for their memory: nothing is learned from then on."""
        del self.model, self.trainable, self.optimizer

    def readers(self) -> dict[str, Any]:
        """Return the model."""
        return {"model": self.model}
