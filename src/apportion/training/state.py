"""State that a checkpoint holds: weights and optimizer state, packed into tensors and restored exactly."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from apportion.errors import ConfigError
from apportion.training.crash_dump import CrashDump

Tensors = dict[str, dict[str, Tensor]]  # file -> name -> tensor


class Checkpointable(Protocol):
    """What a stage carries from batch to batch, all of it in the checkpoint.

    The positions of the schedule and of the data follow from the step. Global random states are saved for every stage
    (`training.rng`).
    """

    @property
    def is_sharded(self) -> bool:
        """Whether each process holds a part of the weights: `state_dict` is then called by all, and gathers."""

    def state_dict(self) -> Tensors:
        """Return everything by file and name; the values are read before anything changes them."""

    def load_state_dict(self, stored: Tensors) -> None:
        """Restore everything. Raises ConfigError where it does not fit."""

    def models_by_name(self) -> Mapping[str, Any]:
        """Return the models by name: their devices, dtypes and kernels affect bitwise reproducibility."""


class TrainableLearner(Checkpointable, Protocol):
    """A learner that a `TrainingSession` loads, resumes, checkpoints and saves."""

    @property
    def crash_dump(self) -> CrashDump | None:
        """What writes the current batch when a step fails, None for a stage without rollouts."""

    def set_up_sharding(self, abort: Callable[[str], None]) -> None:
        """Agree on the initial weights, and shard them where the launcher asks for it.

        Args:
            abort: ends this process with the error of another one that left it waiting.
        """

    def broadcast_weights(self) -> None:
        """Broadcast the weights of the main process, after resuming."""

    def gather_weights(self) -> None:
        """Gather sharded weights in the main process, in float32, to be saved; nothing is trained after this."""


def pack_state(parameters: Sequence[nn.Parameter], optimizer: torch.optim.Optimizer) -> Tensors:
    """Return {"weights": parameters by number, "optimizer": state by number and name}."""
    return {
        "weights": {str(i): p.detach().cpu() for i, p in enumerate(parameters)},
        "optimizer": {
            f"{i}.{name}": value.cpu()
            for i, p in enumerate(parameters)
            for name, value in optimizer.state.get(p, {}).items()
        },
    }


@torch.no_grad()
def unpack_state(
    stored: Tensors,
    parameters: Sequence[nn.Parameter],
    optimizer: torch.optim.Optimizer,
    remainders: Mapping[nn.Parameter, Tensor],
) -> None:
    """Restore what `pack_state` returned, into torch-allocated memory and into the same `remainders`.

    Raises:
        ConfigError: other parameters than these were stored.
    """
    weights = stored["weights"]
    shapes = {str(i): (tuple(p.shape), p.dtype) for i, p in enumerate(parameters)}
    if shapes != {name: (tuple(w.shape), w.dtype) for name, w in weights.items()}:
        fix = "Restore the model that the run started from, or pass --fresh to start over."
        got = f"{len(weights)} trainable tensors, of other shapes than the model's {len(shapes)}"
        raise ConfigError("checkpoint", got, "the model that the run started from", fix)
    moments: dict[str, dict[str, Tensor]] = {str(i): {} for i in range(len(parameters))}
    for key, value in stored["optimizer"].items():
        number, _, name = key.partition(".")
        moments[number][name] = value
    for i, parameter in enumerate(parameters):
        parameter.copy_(weights[str(i)])
        # `step` too: the fused optimizer counts on the parameter's device
        state = {name: value.to(parameter.device) for name, value in moments[str(i)].items()}
        if "remainder" in state:  # the optimizer of master weights holds the same tensor
            state["remainder"] = remainders[parameter].copy_(state["remainder"])
        optimizer.state[parameter] = state
