"""Data parallelism: what processes tell one another. Everything here is the identity in one process.

Processes are started by `accelerate launch` or `torchrun`; accelerate opens the process group and chooses devices. Each
process samples, scores and apportions its own prompts; the batch is then gathered, so that statistics over it are those
of one process; each mini-batch is split, and its gradient summed. Errors are told over a group of their own ("control",
gloo), so that one that strikes a single process ends all of them with one message.
"""

from __future__ import annotations

import os
import traceback
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from apportion import errors
from apportion.errors import ApportionError, ConfigError

T = TypeVar("T")
BUCKET = 32 * 2**20  # elements of one all-reduce: 128 MB of float32
FAREWELL = timedelta(seconds=10)  # what the others wait for the main process to say what went wrong
PATIENCE = timedelta(hours=12)  # the main process may evaluate for hours while the others wait for it
_control: Any = None  # the gloo group of small messages, while a process group is open


class ProcessError(ApportionError):
    """Another process failed: raised in those that did not, the main one with what went wrong."""


def launched() -> int:
    """Return how many processes the launcher says it started, 1 without one; nothing needs to be open yet."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "LOCAL_RANK" in os.environ else 1


def is_log_rank() -> bool:
    """Whether this process may print: the main one, and before a group is open the first one of each machine."""
    return is_main() if _control is not None else os.environ.get("LOCAL_RANK", "0") == "0"


def world_size() -> int:
    """Return the number of processes."""
    return dist.get_world_size() if _control is not None else 1


def rank() -> int:
    """Return the number of this process, from 0."""
    return dist.get_rank() if _control is not None else 0


def is_main() -> bool:
    """Whether this is process 0, which writes files and messages."""
    return rank() == 0


def start(device: torch.device) -> None:
    """Open the process group through accelerate where a launcher started several processes; else do nothing.

    gloo on a CPU, nccl on GPUs, where each process gets the GPU of its local number as its current device.

    Raises:
        ConfigError: fewer GPUs than processes, or a device other than the launcher's.
    """
    global _control
    if launched() == 1 or _control is not None:
        return
    _check_device(device)
    from accelerate import PartialState

    PartialState(cpu=device.type == "cpu", timeout=PATIENCE)
    _control = dist.new_group(backend="gloo", timeout=PATIENCE)


def _check_device(device: torch.device) -> None:
    if device.type == "cpu":
        return
    if os.environ.get("ACCELERATE_USE_CPU", "false").lower() == "true":
        fix = "Pass --device cpu, or launch without --cpu."
        raise ConfigError("device", device.type, "cpu, as `accelerate launch --cpu` says", fix)
    here, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", launched())), torch.cuda.device_count()
    if here > gpus:
        fix = f"Launch at most {gpus} on this machine, or pass --device cpu."
        raise ConfigError("processes", f"{here} on a machine with {gpus} GPUs", "one GPU a process", fix)


def stop() -> None:
    """Close the process group. The others wait a little for the main process, whose message would be lost if they
    left first: a launcher ends all processes when one fails."""
    global _control
    if _control is None:
        return
    with suppress(RuntimeError):  # a process that is gone, or that is still busy: there is nothing to wait for
        dist.monitored_barrier(_control, timeout=FAREWELL)
    _control = None
    dist.destroy_process_group()


@contextmanager
def error_barrier() -> Iterator[None]:
    """Run a part that exchanges nothing in every process; an error in any of them is raised in all at its end.

    The main process raises the first failing process's error: the same class and text for one that the user can fix,
    else a ProcessError with its traceback. The others raise ProcessError, which is not printed. A part inside another
    tells of an error for both.
    """
    if world_size() == 1:
        yield
        return
    error: BaseException | None = None
    try:
        yield
    except (Exception, SystemExit) as caught:  # raised again below, in every process
        if getattr(caught, "shared", False):
            raise
        error = caught
    failed = torch.tensor([error is not None], dtype=torch.int64)
    dist.all_reduce(failed, group=_control)
    if failed.item():
        first = _first(error)
        first.shared = True  # type: ignore[attr-defined]
        if first is error:
            raise first  # with the cause that it has
        raise first from error


def _first(error: BaseException | None) -> BaseException:
    """Return what this process raises for the error of the first process that has one, as `together` says."""
    told: list[Any] = [None] * world_size()
    dist.all_gather_object(told, None if error is None else describe_error(error), group=_control)
    first = next(i for i, one in enumerate(told) if one is not None)
    if first == rank() == 0 and error is not None:
        return error
    if not is_main():
        return ProcessError(f"process {first} failed: {told[first]['text']}")
    return error_of_process(first, told[first])


def describe_error(error: BaseException) -> dict[str, Any]:
    """Return an error as plain values for another process."""
    text = f"SystemExit: {error}" if isinstance(error, SystemExit) else str(error)
    known = error.to_data() if isinstance(error, ApportionError) else None
    return {"known": known, "text": text, "trace": "".join(traceback.format_exception(error))}


def error_of_process(process: int, data: Mapping[str, Any]) -> ApportionError:
    """Return the error of another process: of the same class where the user can fix it, else with its traceback."""
    if data["known"] is not None:
        return errors.from_data(data["known"], process)
    return ProcessError(f"process {process} failed.\n{data['trace']}")


def broadcast_object(value: T) -> T:
    """Return the main process's `value`, a small object that can be pickled, in every process."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, group=_control)
    return box[0]


def all_reduce_max(values: Mapping[str, float]) -> dict[str, float]:
    """Return the largest of each number over the processes; the names are the same in all."""
    names = sorted(values)
    if world_size() == 1 or not names:
        return dict(values)
    numbers = torch.tensor([values[name] for name in names], dtype=torch.float64)
    dist.all_reduce(numbers, dist.ReduceOp.MAX, group=_control)
    return dict(zip(names, numbers.tolist(), strict=True))


def shard_slice(count: int, process: int | None = None) -> slice:
    """Return the part of `count` things in a row that belongs to this process (or to `process`): neighbours, as evenly
    as may be."""
    process = rank() if process is None else process
    return slice(count * process // world_size(), count * (process + 1) // world_size())


def shard(rows: Tensor) -> Tensor:
    """Return this process's part of `rows` (N,): every world-th one, so that parts differ by one row at most."""
    return rows[rank() :: world_size()]


def all_reduce_tensor(x: Tensor) -> Tensor:
    """Return `x` summed over the processes: the `reduce` of the reductions in `masking`."""
    if world_size() > 1:
        x = x.clone()
        dist.all_reduce(x)
    return x


def all_reduce_sum(sums: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return scalars summed over the processes; a name that a process lacks counts as 0 there.

    All scalars are on the processes' device; on GPUs no process may lack them all.
    """
    if world_size() == 1:
        return dict(sums)
    told: list[Any] = [None] * world_size()
    dist.all_gather_object(told, list(sums), group=_control)
    names = sorted({name for one in told for name in one})
    if not names:
        return {}
    zero = torch.zeros_like(next(iter(sums.values())), dtype=torch.float32) if sums else torch.zeros(())
    return dict(
        zip(names, all_reduce_tensor(torch.stack([sums.get(name, zero).float() for name in names])), strict=True)
    )


def broadcast(tensors: Iterable[Tensor]) -> None:
    """Overwrite `tensors` with the main process's, so that all start from the same."""
    if world_size() > 1:
        for tensor in tensors:
            dist.broadcast(tensor.data, src=0)


def sum_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Replace each gradient by its sum over the processes, in float32 and in flat buckets.

    Each process's loss is already divided by the denominator of the whole mini-batch, so the sum is one process's
    gradient. A parameter without a gradient here counts as 0; one without any anywhere keeps None.
    """
    if world_size() == 1:
        return
    there = list(parameters)
    if not there:
        return
    device = there[0].device
    some = all_reduce_tensor(torch.tensor([p.grad is not None for p in there], dtype=torch.float32, device=device))
    used = [p for p, count in zip(there, some.tolist(), strict=True) if count]
    for bucket in _buckets(used):
        flat = torch.cat([(p.grad if p.grad is not None else torch.zeros_like(p)).float().flatten() for p in bucket])
        dist.all_reduce(flat)
        for p, part in zip(bucket, flat.split([p.numel() for p in bucket]), strict=True):
            p.grad = part.view_as(p).to(p.dtype)


def _buckets(parameters: list[torch.nn.Parameter]) -> Iterator[list[torch.nn.Parameter]]:
    """Yield neighbours of at most BUCKET elements together, a larger one alone."""
    bucket: list[torch.nn.Parameter] = []
    for parameter in parameters:
        if bucket and sum(p.numel() for p in bucket) + parameter.numel() > BUCKET:
            yield bucket
            bucket = []
        bucket.append(parameter)
    if bucket:
        yield bucket


def gather_rows(x: Tensor, *, fill: float = 0, left: bool = False) -> Tensor:
    """Return the rows of all processes' `x` (B,…) below one another, in their order: (ΣB,…).

    The second dimension may differ: it is padded with `fill` to the longest, on the right unless `left`. Exact for
    every dtype. Dimensions beyond the second are the same in all.
    """
    if world_size() == 1:
        return x
    width = x.shape[1] if x.dim() > 1 else 1
    shapes: list[Any] = [None] * world_size()
    dist.all_gather_object(shapes, (len(x), width), group=_control)
    rows, widest = max(r for r, _ in shapes), max(w for _, w in shapes)
    body = x if x.dim() > 1 else x[:, None]
    padded = body.new_full((rows, widest, *body.shape[2:]), fill)
    padded[: len(x), slice(widest - width, None) if left else slice(0, width)] = body
    # bytes: not every backend knows every dtype
    flat = padded.flatten().view(torch.uint8)
    parts = [torch.empty_like(flat) for _ in shapes]
    dist.all_gather(parts, flat)
    whole = [p.view(x.dtype).view(padded.shape)[:count] for p, (count, _) in zip(parts, shapes, strict=True)]
    found = torch.cat(whole)
    return found if x.dim() > 1 else found[:, 0]


def gather_rows_to_main(x: Tensor, rows: int) -> Tensor:
    """Return all processes' parts of a tensor with `rows` rows in the main process, an empty one in the others.

    Args:
        x: (r,…) on the CPU, neighbouring rows, as `Tensor.chunk` cuts them: ⌈rows/processes⌉, fewer in the last.
    """
    size = -(-rows // world_size())
    padded = x.new_zeros((size, *x.shape[1:]))
    padded[: len(x)] = x
    flat = padded.flatten().view(torch.uint8)  # bytes: not every backend knows every dtype
    parts = [torch.empty_like(flat) for _ in range(world_size())] if is_main() else None
    dist.gather(flat, parts, group=_control)
    if parts is None:
        return x[:0]
    return torch.cat(parts).view(x.dtype).view(size * world_size(), *x.shape[1:])[:rows]
