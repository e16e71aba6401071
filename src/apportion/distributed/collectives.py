"""Collectives of data parallelism, each of them the identity in one process.

Processes are started by `accelerate launch` or `torchrun`; accelerate opens the process group and chooses devices. Each
process samples, scores and apportions its own prompts; the batch is then gathered, so that statistics over it are those
of one process; each mini-batch is split, and its gradients are summed. Errors and small objects use a gloo group of
their own ("control"), so that an error in one process ends all of them with one message.
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
from apportion.distributed import launcher
from apportion.errors import ApportionError, ConfigError

T = TypeVar("T")
BUCKET = 32 * 2**20  # elements of one all-reduce: 128 MB of float32
STOP_TIMEOUT = timedelta(seconds=10)  # how long the others wait for the main process to print an error
TIMEOUT = timedelta(hours=12)  # the main process may evaluate for hours while the others wait for it
_control: Any = None  # the gloo group of small messages, while a process group is open


class ProcessError(ApportionError):
    """Another process failed: raised in those that did not."""


def world_size() -> int:
    """Return the number of processes."""
    return dist.get_world_size() if _control is not None else 1


def rank() -> int:
    """Return the rank of this process, from 0."""
    return dist.get_rank() if _control is not None else 0


def is_main() -> bool:
    """Whether this is rank 0, which writes files and messages."""
    return rank() == 0


def start(device: torch.device) -> None:
    """Open the process group through accelerate where a launcher started several processes; else do nothing.

    gloo on a CPU, nccl on GPUs, where each process gets the GPU of its local number as its current device.

    Raises:
        ConfigError: fewer GPUs than processes, or another device than the launcher's.
    """
    global _control
    if launcher.launched() == 1 or _control is not None:
        return
    _check_device(device)
    from accelerate import PartialState

    PartialState(cpu=device.type == "cpu", timeout=TIMEOUT)
    _control = dist.new_group(backend="gloo", timeout=TIMEOUT)
    launcher.group_rank = dist.get_rank()


def _check_device(device: torch.device) -> None:
    if device.type == "cpu":
        return
    if os.environ.get("ACCELERATE_USE_CPU", "false").lower() == "true":
        fix = "Pass --device cpu, or launch without --cpu."
        raise ConfigError("device", device.type, "cpu, as `accelerate launch --cpu` says", fix)
    here, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", launcher.launched())), torch.cuda.device_count()
    if here > gpus:
        fix = f"Launch at most {gpus} on this machine, or pass --device cpu."
        raise ConfigError("processes", f"{here} on a machine with {gpus} GPUs", "one GPU a process", fix)


def stop() -> None:
    """Close the process group. The others first wait a little for the main process: a launcher ends all processes when
    one fails, and its message would be lost if they left before it."""
    global _control
    if _control is None:
        return
    with suppress(RuntimeError):  # a process is gone or still busy
        dist.monitored_barrier(_control, timeout=STOP_TIMEOUT)
    _control = launcher.group_rank = None
    dist.destroy_process_group()


@contextmanager
def error_barrier() -> Iterator[None]:
    """Run a block without collectives in every process; an error in any of them is raised in all at its end.

    The main process raises the first failing process's error: the same class and text for one that a user can fix, else
    a ProcessError with its traceback. The others raise ProcessError, which is not printed. Of nested blocks the inner
    one exchanges the error.
    """
    if world_size() == 1:
        yield
        return
    error: BaseException | None = None
    try:
        yield
    except (Exception, SystemExit) as caught:  # raised below, in every process
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
    """Return the error that this process raises for the first failing process's; see `error_barrier`."""
    descriptions: list[Any] = [None] * world_size()
    dist.all_gather_object(descriptions, None if error is None else describe_error(error), group=_control)
    first = next(i for i, description in enumerate(descriptions) if description is not None)
    if first == rank() == 0 and error is not None:
        return error
    if not is_main():
        return ProcessError(f"process {first} failed: {descriptions[first]['text']}")
    return error_of_process(first, descriptions[first])


def describe_error(error: BaseException) -> dict[str, Any]:
    """Return an error as plain values for another process."""
    text = f"SystemExit: {error}" if isinstance(error, SystemExit) else str(error)
    known = error.to_data() if isinstance(error, ApportionError) else None
    return {"known": known, "text": text, "trace": "".join(traceback.format_exception(error))}


def error_of_process(process: int, data: Mapping[str, Any]) -> ApportionError:
    """Return the error of another process: of the same class where a user can fix it, else with its traceback."""
    if data["known"] is not None:
        return errors.from_data(data["known"], process)
    return ProcessError(f"process {process} failed.\n{data['trace']}")


def broadcast_object(value: T) -> T:
    """Return the main process's `value`, a small picklable object, in every process."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, group=_control)
    return box[0]


def all_reduce_max(values: Mapping[str, float]) -> dict[str, float]:
    """Return the maximum of each number over the processes; the names are the same in all."""
    names = sorted(values)
    if world_size() == 1 or not names:
        return dict(values)
    numbers = torch.tensor([values[name] for name in names], dtype=torch.float64)
    dist.all_reduce(numbers, dist.ReduceOp.MAX, group=_control)
    return dict(zip(names, numbers.tolist(), strict=True))


def shard_slice(count: int) -> slice:
    """Return the contiguous share of `count` items of this process, as even as possible."""
    return slice(count * rank() // world_size(), count * (rank() + 1) // world_size())


def shard(rows: Tensor) -> Tensor:
    """Return this process's share of `rows` (N,): every world-size-th row; shares differ by one row at most."""
    return rows[rank() :: world_size()]


def all_reduce_tensor(x: Tensor) -> Tensor:
    """Return `x` summed over the processes: the `reduce` of the reductions in `masking`."""
    if world_size() > 1:
        x = x.clone()
        dist.all_reduce(x)
    return x


def all_reduce_sum(sums: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return scalars summed over the processes; a name missing in a process counts as 0 there.

    All scalars are on the processes' device; on GPUs every process has at least one.
    """
    if world_size() == 1:
        return dict(sums)
    known: list[Any] = [None] * world_size()
    dist.all_gather_object(known, list(sums), group=_control)
    names = sorted({name for one in known for name in one})
    if not names:
        return {}
    zero = torch.zeros_like(next(iter(sums.values())), dtype=torch.float32) if sums else torch.zeros(())
    return dict(
        zip(names, all_reduce_tensor(torch.stack([sums.get(name, zero).float() for name in names])), strict=True)
    )


def broadcast(tensors: Iterable[Tensor]) -> None:
    """Overwrite `tensors` with the main process's, so that all processes start with the same values."""
    if world_size() > 1:
        for tensor in tensors:
            dist.broadcast(tensor.data, src=0)


def sum_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Replace each gradient by its sum over the processes, in float32 and in flat buckets.

    Each process's loss is already divided by the denominator of the whole mini-batch, so the sum is the gradient that
    one process would have. A parameter without a gradient here counts as 0; one without a gradient in any process keeps
    None.
    """
    if world_size() == 1:
        return
    trained = list(parameters)
    if not trained:
        return
    device = trained[0].device
    counts = all_reduce_tensor(torch.tensor([p.grad is not None for p in trained], dtype=torch.float32, device=device))
    used = [p for p, count in zip(trained, counts.tolist(), strict=True) if count]
    for bucket in _buckets(used):
        flat = torch.cat([(p.grad if p.grad is not None else torch.zeros_like(p)).float().flatten() for p in bucket])
        dist.all_reduce(flat)
        for p, part in zip(bucket, flat.split([p.numel() for p in bucket]), strict=True):
            p.grad = part.view_as(p).to(p.dtype)


def _buckets(parameters: list[torch.nn.Parameter]) -> Iterator[list[torch.nn.Parameter]]:
    """Yield runs of parameters of at most BUCKET elements; a larger parameter is a bucket of its own."""
    bucket: list[torch.nn.Parameter] = []
    for parameter in parameters:
        if bucket and sum(p.numel() for p in bucket) + parameter.numel() > BUCKET:
            yield bucket
            bucket = []
        bucket.append(parameter)
    if bucket:
        yield bucket


def gather_rows(x: Tensor, *, fill: float = 0, left: bool = False) -> Tensor:
    """Return the rows of all processes' `x` (B,…), concatenated in rank order: (ΣB,…).

    The second dimension may differ: it is padded with `fill` to the longest, on the right unless `left`; further
    dimensions are the same in all. Exact for every dtype.
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
    out = torch.cat([p.view(x.dtype).view(padded.shape)[:count] for p, (count, _) in zip(parts, shapes, strict=True)])
    return out if x.dim() > 1 else out[:, 0]


def gather_rows_to_main(x: Tensor, rows: int) -> Tensor:
    """Return the full tensor of `rows` rows in the main process, an empty one in the others.

    Args:
        x: (r,…) on the CPU, this process's chunk as `Tensor.chunk` splits: ⌈rows/processes⌉ rows, fewer in the last.
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
