"""Sharded weights (FSDP2): each process keeps a shard of every weight, gradient, moment and float32 master.

`Weights` is the plain case, a full copy in every process; everything is then the identity or a sum over the processes.
`Sharded` splits models by rows with torch's `fully_shard`. While the policy generates and is scored, which needs no
gradient and unlike numbers of forwards in each process, its weights are gathered once (`unsharded`); in the update each
layer is gathered when it is needed, and every process must make as many forwards as the others (`pad_micro_batches`).

The optimizer knows nothing of this: it steps each process's shards, which are tensors in the same memory.
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

Files = dict[str, dict[str, Tensor]]  # file -> name -> tensor, as `training.state` packs them
SHARDED_FILES = ("weights", "optimizer")  # their names begin with a parameter's number
DDP_RECIPE = "Launch with recipes/accelerate/ddp_gpu.yaml."


def is_requested() -> bool:
    """Whether the launcher asks for sharded weights, in a run of several processes."""
    return collectives.world_size() > 1 and os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def reshard_after_forward() -> bool:
    """Whether the launcher has layers gathered again for the backward pass, rather than kept from the forward."""
    return os.environ.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower() == "true"


def plain_class(module: nn.Module) -> type:
    """Return the class of `module` before it was sharded, which gives it a subclass."""
    from torch.distributed.fsdp import FSDPModule

    return type(module).__mro__[2] if isinstance(module, FSDPModule) else type(module)


class Weights:
    """Replicated weights of a policy: a full copy in every process.

    Attributes:
        sharded: whether each process keeps a shard. layerwise: whether layers are gathered when they are needed, so
            that every process must make the same forwards.
    """

    sharded = False
    layerwise = False

    def local_parameters(self, parameters: Sequence[nn.Parameter]) -> list[nn.Parameter]:
        """Return what the optimizer steps in this process for each of the model's `parameters`."""
        return list(parameters)

    def replicated(self, parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
        """Return those of `parameters` of which every process has a full copy."""
        return list(parameters)

    def unsharded(self) -> AbstractContextManager[None]:
        """Have full weights inside, where no process waits for another."""
        return nullcontext()

    def relay_errors(self) -> AbstractContextManager[None]:
        """Run a part in which processes may wait for one another: an error in one ends all."""
        return nullcontext()

    def error_barrier(self) -> AbstractContextManager[None]:
        """Run code that may fail in one process only, between collectives: it then fails in all."""
        return nullcontext()

    def pad_micro_batches(self, parts: list[Tensor], spare: Tensor) -> list[tuple[Tensor, bool]]:
        """Return (rows, whether they count) of each micro-batch of this process, whose own are `parts`.

        Args:
            spare: a row (1,) of the mini-batch that can be computed once more without counting.
        """
        return [(part, True) for part in parts]

    def reduce_gradients(self, parameters: Sequence[nn.Parameter]) -> list[nn.Parameter]:
        """Return `local_parameters(parameters)` with gradients summed over the processes."""
        collectives.sum_gradients(parameters)
        return list(parameters)

    def gradient_norm(self, parameters: Sequence[nn.Parameter]) -> Tensor:
        """Return the 2-norm () of the whole gradient, of which the local `parameters` have this process's shard."""
        return total_norm(parameters)

    def gather_state(self, files: Files) -> Files:
        """Return the full tensors of a checkpoint in the main process; all processes call it together."""
        return files

    def shard_state(self, files: Files) -> Files:
        """Return this process's shard of what `gather_state` returned."""
        return files

    def unshard_for_saving(self, model: nn.Module, remainders: dict[nn.Parameter, Tensor]) -> None:
        """Give `model` its full weights in the main process, on the CPU, for saving; it cannot be trained after.

        Frozen weights stay sharded, and `remainders` hold the model's only from then on.
        """


class Sharded(Weights):
    """Weights of which every process keeps a shard, split by rows (the first dimension).

    Attributes:
        shards: {the model's parameter: its shard that the optimizer steps here}, of those that are trained.
    """

    sharded = True

    def __init__(
        self,
        models: Sequence[nn.Module],
        parameters: Sequence[nn.Parameter],
        remainders: dict[nn.Parameter, Tensor],
        reshard: bool,
        abort: Callable[[str], None],
    ) -> None:
        """Shard `models` and the `remainders` of their masters, in place.

        Args:
            parameters: all that are trained, in a checkpoint's order; those not of `models` stay replicated.
            reshard: whether layers are gathered again for the backward pass, rather than kept from the forward.
            abort: ends this process with its error while others wait for it (`error_relay`).

        Raises:
            ModelError: a layer's trained weights have several dtypes.
        """
        self.reshard, self.layerwise, self.abort = reshard, True, abort
        # a warning for models whose output is changed in place, which none here is
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module", category=UserWarning)
        self.modules: list[Any] = []
        number = {p: i for i, p in enumerate(parameters)}
        named = [(model, name, p) for model in models for name, p in model.named_parameters()]
        for model in models:
            self.modules += shard(model, reshard)
        self.frozen: list[Any] = [m for m in models if not any(p.requires_grad for p in m.parameters())]
        self.shards: dict[nn.Parameter, nn.Parameter] = {}
        self.numbers: dict[int, nn.Parameter] = {}
        for model, name, before in named:
            after: Any = model.get_parameter(name)
            if before not in number or after is before:
                continue
            with torch.no_grad():
                self.shards[after] = local = nn.Parameter(after.to_local(), requires_grad=True)
            self.numbers[number[before]] = after
            if before in remainders:
                remainders[local] = chunk(remainders.pop(before)).clone()

    def local_parameters(self, parameters: Sequence[nn.Parameter]) -> list[nn.Parameter]:
        """See `Weights.local_parameters`."""
        return [self.shards.get(p, p) for p in parameters]

    def replicated(self, parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
        """See `Weights.replicated`."""
        return [p for p in parameters if p not in self.shards]

    @contextmanager
    def unsharded(self) -> Iterator[None]:
        """See `Weights.unsharded`."""
        with self.relay_errors():
            for module in self.modules:
                module.set_reshard_after_forward(False, recurse=False)
                module.unshard()
        self.layerwise = False
        try:
            yield
        finally:
            self.layerwise = True
            for module in self.modules:
                module.set_reshard_after_forward(self.reshard and not module.apportion_root, recurse=False)
                module.reshard()
        for model in self.frozen:  # else it keeps a record of every forward for a backward pass that never comes
            model.reset_iter_state()

    def relay_errors(self) -> AbstractContextManager[None]:
        """See `Weights.relay_errors`."""
        return relay_errors(self.abort)

    def error_barrier(self) -> AbstractContextManager[None]:
        """See `Weights.error_barrier`."""
        return collectives.error_barrier()

    def pad_micro_batches(self, parts: list[Tensor], spare: Tensor) -> list[tuple[Tensor, bool]]:
        """See `Weights.pad_micro_batches`: as many as the process that has most."""
        most = int(collectives.all_reduce_max({"micro-batches": len(parts)})["micro-batches"])
        return [(part, True) for part in parts] + [(spare, False)] * (most - len(parts))

    def reduce_gradients(self, parameters: Sequence[nn.Parameter]) -> list[nn.Parameter]:
        """See `Weights.reduce_gradients`; FSDP summed those of the shards layer by layer in the backward pass."""
        collectives.sum_gradients(self.replicated(parameters))
        for parameter, local in self.shards.items():
            gradient: Any = parameter.grad
            local.grad = None if gradient is None else gradient.to_local()
            parameter.grad = None
        return self.local_parameters(parameters)

    def gradient_norm(self, parameters: Sequence[nn.Parameter]) -> Tensor:
        """See `Weights.gradient_norm`."""
        shards = set(self.shards.values())
        full = total_norm([p for p in parameters if p not in shards])
        local = total_norm([p for p in parameters if p in shards]).to(parameters[0].device)
        return (collectives.all_reduce_tensor(local.square()) + full.square().to(local.device)).sqrt()

    def gather_state(self, files: Files) -> Files:
        """See `Weights.gather_state`; the other processes get empty tensors."""
        return self._each(files, lambda rows, tensor: collectives.gather_rows_to_main(tensor, rows))

    def shard_state(self, files: Files) -> Files:
        """See `Weights.shard_state`."""
        return self._each(files, lambda rows, tensor: chunk(tensor).clone())

    def _each(self, files: Files, convert: Callable[[int, Tensor], Tensor]) -> Files:
        """Return `files` with convert(rows of the full one, tensor) for each tensor of a sharded parameter."""
        out = dict(files)
        for file in SHARDED_FILES:
            out[file] = dict(sorted(files[file].items()))  # in the same order in every process
            for name, tensor in out[file].items():
                parameter = self.numbers.get(int(name.partition(".")[0]))
                if parameter is not None and tensor.dim():  # an optimizer's `step` is replicated
                    out[file][name] = convert(parameter.shape[0], tensor)
        return out

    def unshard_for_saving(self, model: nn.Module, remainders: dict[nn.Parameter, Tensor]) -> None:
        """See `Weights.unshard_for_saving`."""
        full_remainders: dict[nn.Parameter, Tensor] = {}
        full: dict[nn.Parameter, nn.Parameter] = {}
        for parameter in [p for p in model.parameters() if p in self.shards]:
            rows, local = parameter.shape[0], self.shards[parameter]
            full[parameter] = nn.Parameter(collectives.gather_rows_to_main(local.detach().cpu(), rows))
            if local in remainders:
                remainder = collectives.gather_rows_to_main(remainders[local].cpu(), rows)
                full_remainders[full[parameter]] = remainder
        for module in model.modules():
            for name, parameter in list(module.named_parameters(recurse=False, remove_duplicate=False)):
                if parameter in full and collectives.is_main():
                    setattr(module, name, full[parameter])
        remainders.clear()
        remainders.update(full_remainders)


def chunk(tensor: Tensor) -> Tensor:
    """Return this process's rows of a full tensor, as `fully_shard` splits it: the last processes may have none."""
    parts = tensor.chunk(collectives.world_size())
    return parts[collectives.rank()] if collectives.rank() < len(parts) else tensor[:0]


def layers_of(model: nn.Module) -> list[nn.Module]:
    """Return the layers of every stack in `model`: the members of its module lists, except of lists within a layer."""
    layers: list[nn.Module] = []
    inside: set[nn.Module] = set()
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and module not in inside:
            layers += module
            inside.update(part for layer in module for part in layer.modules())
    return layers


def shard(model: nn.Module, reshard: bool) -> list[Any]:
    """Shard every layer of `model`, and the rest of it as one; return the modules, each gathered as a unit."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    device = next(model.parameters()).device.type
    mesh = init_device_mesh(device, (collectives.world_size(),))
    check_groups(model)
    modules: list[Any] = [*layers_of(model), model]
    for module in modules:
        root = module is model  # stays gathered after the forward: the output layer's weight is used after it
        # gradients are summed in float32 whatever the weights are
        precision = MixedPrecisionPolicy(reduce_dtype=torch.float32)
        fully_shard(module, mesh=mesh, reshard_after_forward=reshard and not root, mp_policy=precision)
        module.apportion_root = root
        # each loss is divided by the whole mini-batch's count already: sums, not means
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    return modules


def check_groups(model: nn.Module) -> None:
    """Raise ModelError where layers cannot be gathered one by one: trained in several dtypes, or sharing weights."""
    layers = layers_of(model)
    inside = {part for layer in layers for part in layer.modules()}
    rest = [p for m in model.modules() if m not in inside for p in m.parameters(recurse=False)]
    uses = Counter(p for group in ([*layer.parameters()] for layer in layers) for p in group) + Counter(set(rest))
    if max(uses.values(), default=1) > 1:
        raise ModelError("policy", "weights that several layers share", "layers to be sharded apart", DDP_RECIPE)
    dtypes = {str(p.dtype).removeprefix("torch.") for p in model.parameters() if p.requires_grad}
    if len(dtypes) > 1:
        got = f"trained weights in {' and '.join(sorted(dtypes))}"
        raise ModelError("policy", got, "one dtype, to be sharded", DDP_RECIPE)
