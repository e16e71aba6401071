"""Sharded weights (FSDP2): each process keeps a part of every weight, gradient, moment and float32 master.

`Weights` is the plain case, weights whole in every process, and there everything here is the identity or a sum.
`Sharded` cuts models by rows with torch's `fully_shard`. While the policy writes and is read, which needs no gradient
and unlike numbers of forwards, its weights are gathered once (`gathered`); in the update layers are gathered as they
are needed, and every process makes as many forwards as the others (`even`, `agreed`).

The optimizer knows nothing of this: it steps each process's parts, which are tensors of their own in the same memory.
"""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from apportion.distributed import collectives
from apportion.distributed.error_relay import relay_errors
from apportion.distributed.grad_norm import total_norm
from apportion.errors import ModelError

Files = dict[str, dict[str, Tensor]]  # file -> name -> tensor, as `stages.held` has them
PARTED = ("weights", "optimizer")  # files whose names begin with a parameter's number


def asked() -> bool:
    """Whether the launcher asks for sharded weights, in a run of several processes."""
    return collectives.world_size() > 1 and os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def again() -> bool:
    """Whether the launcher has layers gathered once more for the backward pass."""
    return os.environ.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower() == "true"


def plain_class(module: nn.Module) -> type:
    """Return the class of `module` as it was before it was sharded, which gives it a subclass."""
    from torch.distributed.fsdp import FSDPModule

    return type(module).__mro__[2] if isinstance(module, FSDPModule) else type(module)


class Weights:
    """How the weights of a policy are kept: whole in every process.

    Attributes:
        sharded: whether each process keeps a part. layerwise: whether layers are being gathered as they are needed, so
            that every process must make the same forwards.
    """

    sharded = False
    layerwise = False

    def learning(self, parameters: Sequence[nn.Parameter]) -> list[nn.Parameter]:
        """Return what the optimizer steps in this process for each of the model's `parameters`."""
        return list(parameters)

    def alike(self, parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
        """Return those of `parameters` that every process keeps whole."""
        return list(parameters)

    def gathered(self) -> AbstractContextManager[None]:
        """Have whole weights inside, where no process waits for another."""
        return nullcontext()

    def waiting(self) -> AbstractContextManager[None]:
        """Run a part in which processes may wait for one another: an error in one ends all."""
        return nullcontext()

    def agreed(self) -> AbstractContextManager[None]:
        """Run code that may fail in one process alone; between parts that processes do together it fails in all."""
        return nullcontext()

    def even(self, parts: list[Tensor], spare: Tensor) -> list[tuple[Tensor, bool]]:
        """Return (rows, whether they count) of each micro-batch of this process, of whose share `parts` are.

        Args:
            spare: a row (1,) of the mini-batch that can be computed once more and not count.
        """
        return [(part, True) for part in parts]

    def summed(self, parameters: Sequence[nn.Parameter]) -> list[nn.Parameter]:
        """Return `learning(parameters)` with gradients that are summed over the processes."""
        collectives.sum_gradients(parameters)
        return list(parameters)

    def norm(self, learning: Sequence[nn.Parameter]) -> Tensor:
        """Return the 2-norm () of the whole gradient, of which `learning` has this process's part."""
        return total_norm(learning)

    def join(self, files: Files) -> Files:
        """Return the tensors of a checkpoint whole, from everyone's parts; the main process's, whom all others help."""
        return files

    def cut(self, files: Files) -> Files:
        """Return this process's part of what `join` made."""
        return files

    def make_whole(self, model: nn.Module, remainders: dict[nn.Parameter, Tensor]) -> None:
        """Give `model` its whole weights in the main process, on the CPU, for saving; nothing can be learned after.

        What is frozen stays in parts, and `remainders` are the model's alone from then on.
        """


class Sharded(Weights):
    """Weights of which every process keeps a part, cut by rows (the first dimension).

    Attributes:
        pieces: {the model's parameter: the part of it that the optimizer steps here}, of those that learn.
    """

    sharded = True

    def __init__(
        self,
        models: Sequence[nn.Module],
        parameters: Sequence[nn.Parameter],
        remainders: dict[nn.Parameter, Tensor],
        again: bool,
        end: Callable[[str], None],
    ) -> None:
        """Cut `models` and the `remainders` of their masters, in place.

        Args:
            parameters: all that learns, in the order of a checkpoint; those not of `models` stay whole.
            again: whether layers are gathered once more for the backward pass, rather than kept from the forward.
            end: ends this process with an error while others wait for it (`error_relay`).

        Raises:
            ModelError: a layer's weights that learn are of several dtypes.
        """
        self.again, self.layerwise, self.end = again, True, end
        # a warning for models whose output is changed in place, which none here is
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module", category=UserWarning)
        self.modules: list[Any] = []
        number = {p: i for i, p in enumerate(parameters)}
        named = [(model, name, p) for model in models for name, p in model.named_parameters()]
        for model in models:
            self.modules += shard(model, again)
        self.frozen: list[Any] = [m for m in models if not any(p.requires_grad for p in m.parameters())]
        self.pieces: dict[nn.Parameter, nn.Parameter] = {}
        self.numbers: dict[int, nn.Parameter] = {}
        for model, name, before in named:
            after: Any = model.get_parameter(name)
            if before not in number or after is before:
                continue
            with torch.no_grad():
                self.pieces[after] = piece = nn.Parameter(after.to_local(), requires_grad=True)
            self.numbers[number[before]] = after
            if before in remainders:
                remainders[piece] = chunk(remainders.pop(before)).clone()

    def learning(self, parameters: Sequence[nn.Parameter]) -> list[nn.Parameter]:
        """See `Weights.learning`."""
        return [self.pieces.get(p, p) for p in parameters]

    def alike(self, parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
        """See `Weights.alike`."""
        return [p for p in parameters if p not in self.pieces]

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """See `Weights.gathered`."""
        with self.waiting():
            for module in self.modules:
                module.set_reshard_after_forward(False, recurse=False)
                module.unshard()
        self.layerwise = False
        try:
            yield
        finally:
            self.layerwise = True
            for module in self.modules:
                module.set_reshard_after_forward(self.again and not module.apportion_root, recurse=False)
                module.reshard()
        for model in self.frozen:  # else it keeps a note of every forward for a backward pass that never comes
            model.reset_iter_state()

    def waiting(self) -> AbstractContextManager[None]:
        """See `Weights.waiting`."""
        return relay_errors(self.end)

    def agreed(self) -> AbstractContextManager[None]:
        """See `Weights.agreed`."""
        return collectives.error_barrier()

    def even(self, parts: list[Tensor], spare: Tensor) -> list[tuple[Tensor, bool]]:
        """See `Weights.even`: as many as the process that has most."""
        most = int(collectives.all_reduce_max({"micro-batches": len(parts)})["micro-batches"])
        return [(part, True) for part in parts] + [(spare, False)] * (most - len(parts))

    def summed(self, parameters: Sequence[nn.Parameter]) -> list[nn.Parameter]:
        """See `Weights.summed`; the parts' were summed as soon as each layer's were there."""
        collectives.sum_gradients(self.alike(parameters))
        for parameter, piece in self.pieces.items():
            gradient: Any = parameter.grad
            piece.grad = None if gradient is None else gradient.to_local()
            parameter.grad = None
        return self.learning(parameters)

    def norm(self, learning: Sequence[nn.Parameter]) -> Tensor:
        """See `Weights.norm`."""
        parts = set(self.pieces.values())
        whole = total_norm([p for p in learning if p not in parts])
        part = total_norm([p for p in learning if p in parts]).to(learning[0].device)
        return (collectives.all_reduce_tensor(part.square()) + whole.square().to(part.device)).sqrt()

    def join(self, files: Files) -> Files:
        """See `Weights.join`; the other processes get empty tensors."""
        return self._each(files, lambda rows, tensor: collectives.gather_rows_to_main(tensor, rows))

    def cut(self, files: Files) -> Files:
        """See `Weights.cut`."""
        return self._each(files, lambda rows, tensor: chunk(tensor).clone())

    def _each(self, files: Files, do: Callable[[int, Tensor], Tensor]) -> Files:
        """Return `files` with do(rows of the whole, tensor) in place of each tensor of a parameter that is cut."""
        found = dict(files)
        for file in PARTED:
            found[file] = dict(sorted(files[file].items()))  # in the same order in every process
            for name, tensor in found[file].items():
                parameter = self.numbers.get(int(name.partition(".")[0]))
                if parameter is not None and tensor.dim():  # an optimizer's `step` is everyone's
                    found[file][name] = do(parameter.shape[0], tensor)
        return found

    def make_whole(self, model: nn.Module, remainders: dict[nn.Parameter, Tensor]) -> None:
        """See `Weights.make_whole`."""
        found: dict[nn.Parameter, Tensor] = {}
        new: dict[nn.Parameter, nn.Parameter] = {}
        for parameter in [p for p in model.parameters() if p in self.pieces]:
            rows, piece = parameter.shape[0], self.pieces[parameter]
            whole = collectives.gather_rows_to_main(piece.detach().cpu(), rows)
            new[parameter] = nn.Parameter(whole)
            if piece in remainders:
                found[new[parameter]] = collectives.gather_rows_to_main(remainders[piece].cpu(), rows)
        for module in model.modules():
            for name, parameter in list(module.named_parameters(recurse=False, remove_duplicate=False)):
                if parameter in new and collectives.is_main():
                    setattr(module, name, new[parameter])
        remainders.clear()
        remainders.update(found)


def chunk(whole: Tensor) -> Tensor:
    """Return this process's rows of `whole`, as `fully_shard` cuts them: the last processes may have none."""
    parts = whole.chunk(collectives.world_size())
    return parts[collectives.rank()] if collectives.rank() < len(parts) else whole[:0]


def layers_of(model: nn.Module) -> list[nn.Module]:
    """Return the layers of every stack in `model`: the members of its lists that are not inside another's."""
    found: list[nn.Module] = []
    inside: set[nn.Module] = set()
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and module not in inside:
            found += module
            inside.update(part for layer in module for part in layer.modules())
    return found


def shard(model: nn.Module, again: bool) -> list[Any]:
    """Cut every layer of `model`, and the rest of it as one; return the modules that are gathered at once."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    device = next(model.parameters()).device.type
    mesh = init_device_mesh(device, (collectives.world_size(),))
    check_groups(model)
    modules: list[Any] = [*layers_of(model), model]
    for module in modules:
        root = module is model
        # sums of gradients are of float32 whatever the weights are; the output layer's weight is read after the forward
        sums = MixedPrecisionPolicy(reduce_dtype=torch.float32)
        fully_shard(module, mesh=mesh, reshard_after_forward=again and not root, mp_policy=sums)
        module.apportion_root = root
        # each loss is divided by the whole mini-batch's count already: sums, not means
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    return modules


def check_groups(model: nn.Module) -> None:
    """Raise ModelError where weights cannot be gathered and summed a layer at a time: they learn in several dtypes, or
    are in several layers."""
    layers = layers_of(model)
    inside = {part for layer in layers for part in layer.modules()}
    rest = [p for m in model.modules() if m not in inside for p in m.parameters(recurse=False)]
    found = Counter(p for group in ([*layer.parameters()] for layer in layers) for p in group) + Counter(set(rest))
    if max(found.values(), default=1) > 1:
        fix = "Launch with recipes/accelerate/ddp_gpu.yaml."
        raise ModelError("policy", "weights that several layers share", "layers to be sharded apart", fix)
    dtypes = {str(p.dtype).removeprefix("torch.") for p in model.parameters() if p.requires_grad}
    if len(dtypes) > 1:
        fix = "Launch with recipes/accelerate/ddp_gpu.yaml."
        got = f"weights that learn in {' and '.join(sorted(dtypes))}"
        raise ModelError("policy", got, "one dtype, to be sharded", fix)
