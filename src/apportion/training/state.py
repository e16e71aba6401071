"""What a checkpoint holds of anything that learns: weights and optimizer state, taken out and put back exactly."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from apportion.errors import ConfigError

Tensors = dict[str, dict[str, Tensor]]  # file -> name -> tensor


class Held(Protocol):
    """What a stage holds between batches, all of it in the checkpoint.

    The schedule's position and the data's are the step, on which alone both depend. Global random states are kept for
    every stage (`randomness`).

    Attributes:
        parted: whether each process holds a part of what is learned; then all call `tensors` at once, and the main
            process alone gets it whole.
    """

    @property
    def parted(self) -> bool: ...

    def tensors(self) -> Tensors:
        """Return everything by file and name; the values are read before anything changes them."""

    def restore(self, stored: Tensors) -> None:
        """Take everything back. Raises ConfigError where it does not fit."""

    def readers(self) -> Mapping[str, Any]:
        """Return the models by name, for what their numbers depend on (`run_environment`)."""


def learned(parameters: Sequence[nn.Parameter], optimizer: torch.optim.Optimizer) -> Tensors:
    """Return {"weights": parameters by their number, "optimizer": state by number and name}."""
    return {
        "weights": {str(i): p.detach().cpu() for i, p in enumerate(parameters)},
        "optimizer": {
            f"{i}.{name}": value.cpu()
            for i, p in enumerate(parameters)
            for name, value in optimizer.state.get(p, {}).items()
        },
    }


@torch.no_grad()
def relearn(
    stored: Tensors,
    parameters: Sequence[nn.Parameter],
    optimizer: torch.optim.Optimizer,
    remainders: Mapping[nn.Parameter, Tensor],
) -> None:
    """Put back what `learned` returned, in memory of torch's own, and into the same `remainders`.

    Raises:
        ConfigError: other parameters than these were stored.
    """
    weights = stored["weights"]
    shapes = {str(i): (tuple(p.shape), p.dtype) for i, p in enumerate(parameters)}
    if shapes != {name: (tuple(w.shape), w.dtype) for name, w in weights.items()}:
        fix = "Put the model back that the run began with, or pass --fresh to start over."
        got = f"{len(weights)} tensors that learn, of other shapes than the model's {len(shapes)}"
        raise ConfigError("checkpoint", got, "the model that the run began with", fix)
    moments: dict[str, dict[str, Tensor]] = {str(i): {} for i in range(len(parameters))}
    for key, value in stored["optimizer"].items():
        number, _, name = key.partition(".")
        moments[number][name] = value
    for i, parameter in enumerate(parameters):
        parameter.copy_(weights[str(i)])
        # `step` too: the fused optimizer counts on the parameter's device
        state = {name: value.to(parameter.device) for name, value in moments[str(i)].items()}
        if "remainder" in state:  # the model's keeper holds the same tensor
            state["remainder"] = remainders[parameter].copy_(state["remainder"])
        optimizer.state[parameter] = state
