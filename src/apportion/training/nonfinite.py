"""Optimizer steps skipped because their loss or gradient is not finite, and the limit that ends a run."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from apportion.distributed import collectives
from apportion.errors import MonitorError
from apportion.types import State

CAUSES = (
    "Likely causes: a learning rate too large, bfloat16 overflow, weights that have diverged, or a user-supplied loss. "
    "Lower optim.lr, train in float32 (--dtype float32), or resume from an earlier checkpoint."
)


@dataclass
class SkippedUpdates:
    """Decides for each optimizer step whether it may be taken, and counts those that were not.

    Attributes:
        most: skipped steps in a row that end the run. setting: the name of that setting.
        in_a_row, total: steps skipped so far. batch: those of the current batch.
        rows: rollouts (numbers in the current batch) of its skipped steps.
    """

    most: int = 3
    setting: str = "monitors.max_skipped"
    in_a_row: int = 0
    total: int = 0
    batch: int = 0
    rows: list[int] = field(default_factory=list)

    def begin(self) -> None:
        """Begin a batch."""
        self.batch, self.rows = 0, []

    def allow(self, loss: Tensor, norm: Tensor, rows: Tensor) -> bool:
        """Return whether a step with this process's part of the loss () and the norm () of the summed gradient may be
        taken; `rows` (n,) are the rollouts of its mini-batch. Every process gets the same answer.

        Raises:
            MonitorError: it is the last of `most` skipped steps in a row.
        """
        bad = collectives.all_reduce_tensor(
            torch.stack([~torch.isfinite(loss), ~torch.isfinite(norm)]).float().to(norm.device)
        )
        if not bad.any():
            self.in_a_row = 0
            return True
        self.in_a_row, self.total, self.batch = self.in_a_row + 1, self.total + 1, self.batch + 1
        self.rows += rows.tolist()
        if self.in_a_row >= self.most:
            what, value = ("loss", float(loss)) if bad[0] else ("norm of the gradient", float(norm))
            # the part of the loss that is not finite may be another process's
            got = value if not math.isfinite(value) else math.nan
            field = f"{what} of {self.in_a_row} updates in a row ({self.setting})"
            raise MonitorError(field, got, "finite numbers", CAUSES)
        return False

    @property
    def state(self) -> State:
        """Return what a checkpoint holds: the two counts, () int64."""
        return {"skipped_in_a_row": torch.tensor(self.in_a_row), "skipped_total": torch.tensor(self.total)}

    def load_state(self, state: State) -> None:
        """Restore `state`."""
        self.in_a_row, self.total = int(state["skipped_in_a_row"]), int(state["skipped_total"])
