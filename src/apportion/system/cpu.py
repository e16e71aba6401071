"""CPU threads and freed memory of a command: usable cores, torch's threads, OpenMP's waiting, malloc's settings.

OpenMP reads how its threads wait from the environment, once, when torch loads it, so `configure_waiting` must run
before torch is imported: `apportion/__main__.py`, where the command starts, does so. A program that imports the library
keeps its environment as it is.
"""

from __future__ import annotations

import ctypes
import os
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path

from apportion.errors import ConfigError

# Threads that sleep as soon as they wait. libgomp spins 300,000 times first: on free cores a training step is 10% and
# decoding 30% faster that way, on a core that another task uses it is 2 to 3 times slower (LOG.md). Spin counts in
# between were no better than either.
PASSIVE = {"OMP_WAIT_POLICY": "PASSIVE", "KMP_BLOCKTIME": "0"}
WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")  # any of these set: the user has decided
COUNTS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
LOADAVG = Path("/proc/loadavg")
SAMPLES, INTERVAL = 5, 0.01  # readings of the run queue, seconds between them
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
MMAP_FROM, TRIM_ABOVE = 32 << 20, 2**31 - 1  # bytes; the second is the largest value that mallopt takes
ALLOCATOR = ("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD")  # prefixes of variables with which the user has decided


@dataclass(frozen=True)
class Cores:
    """This process's share of the machine: `count` cores of `processors` logical ones, which `processes` workers of
    one launcher share, and the `reason` for that count in a line."""

    count: int
    processors: int
    processes: int
    reason: str


@dataclass(frozen=True)
class Threads:
    """The threads in use, where their number comes from, how they wait, the cores, and warnings for the log."""

    count: int
    source: str
    waiting: str
    cores: Cores
    warnings: tuple[str, ...] = ()


def available_cores(environment: Mapping[str, str] = os.environ) -> Cores:
    """Return the cores that this process may use.

    joblib counts them: physical cores, or fewer processors where the affinity or the control group's quota says so.
    Workers of a launcher on this machine share them evenly, unless each has an affinity of its own.
    """
    from joblib import cpu_count

    processors, processes = os.cpu_count() or 1, local_processes(environment)
    count = cpu_count(only_physical_cores=True)
    reason = f"{count} cores of {processors} processors"
    if processes > 1 and allowed_processors() == processors:
        count, reason = max(1, count // processes), f"{reason}, shared by {processes} processes"
    return Cores(count, processors, processes, reason)


def allowed_processors() -> int:
    """Return how many logical processors this process may run on (its affinity)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def local_processes(environment: Mapping[str, str] = os.environ) -> int:
    """Return how many workers a launcher started on this machine; 1 when none did."""
    alone = "LOCAL_RANK" not in environment  # then WORLD_SIZE may count one worker on each machine
    count = environment.get("LOCAL_WORLD_SIZE") or ("1" if alone else environment.get("WORLD_SIZE", "1"))
    return max(1, int(count)) if count.isdigit() else 1


def other_tasks(loadavg: Path = LOADAVG) -> float:
    """Return how many other tasks run or wait for a processor now, the median of a few readings; 0 without /proc."""
    counts = []
    for reading in range(SAMPLES if loadavg.is_file() else 0):
        time.sleep(INTERVAL if reading else 0)
        counts.append(int(loadavg.read_text().split()[3].partition("/")[0]) - 1)  # "0.5 1 1 RUNNING/ALL LAST"
    return statistics.median(counts or [0])


def configure_waiting(environment: MutableMapping[str, str] = os.environ, loadavg: Path = LOADAVG) -> str:
    """Make OpenMP's threads sleep while they wait if other tasks want the cores; return how they wait.

    "passive": they sleep, which is now in the environment. "user": as the environment said already. "default":
    OpenMP's default, spinning for a while, because the cores are free, or torch is loaded and it is too late.
    """
    if all(environment.get(name) == value for name, value in PASSIVE.items()):
        return "passive"
    if any(name in environment for name in WAITING):
        return "user"
    if "torch" in sys.modules:
        return "default"
    cores = available_cores(environment)
    if other_tasks(loadavg) + cores.count * cores.processes <= cores.processors:
        return "default"
    environment.update(PASSIVE)
    return "passive"


def configure_threads(threads: int | None = None, *, loadavg: Path = LOADAVG) -> Threads:
    """Set torch's threads and return what was chosen; variables that the user set stay as they are.

    Args:
        threads: how many; None takes OMP_NUM_THREADS or MKL_NUM_THREADS where set, else the available cores.

    Raises:
        ConfigError: fewer than 1.
    """
    if threads is not None and (type(threads) is not int or threads < 1):
        raise ConfigError("threads", threads, "a whole number >= 1, or null", "Leave it out to detect them.")
    cores, variable = available_cores(), next((name for name in COUNTS if _first_number(name)), None)
    if threads is not None:
        count, source = set_threads(threads), "--threads"
    elif variable is not None:
        # not the variable's number: MKL may have limited it to the cores that there are
        count, source = set_threads(None), variable
    else:
        count, source = set_threads(cores.count), "detected"
    waiting = configure_waiting(loadavg=loadavg)
    return Threads(count, source, waiting, cores, tuple(_warnings(cores, count, source, waiting, loadavg)))


def set_threads(threads: int | None) -> int:
    """Give torch `threads` where that is a number, and return the number of threads that it uses now."""
    import torch

    if threads is not None and torch.get_num_threads() != threads:
        torch.set_num_threads(threads)
    return torch.get_num_threads()


def _first_number(name: str) -> int:
    """Return the first number of a variable such as OMP_NUM_THREADS (one a nesting level), 0 for none."""
    first = os.environ.get(name, "").split(",")[0].strip()
    return int(first) if first.isdigit() else 0


def _warnings(cores: Cores, count: int, source: str, waiting: str, loadavg: Path) -> Iterator[str]:
    from joblib import cpu_count

    usable = cores.count if cores.processes > 1 else cpu_count()
    if count > usable:
        yield f"{count} threads ({source}) on {cores.reason}: they will wait for one another; use --threads {usable}"
    if count == 1 < cores.count and cores.processes > 1 and source in COUNTS:
        yield f"{source}=1 is torchrun's default; use --threads {cores.count}, which are free"
    busy = other_tasks(loadavg) if source == "detected" else 0  # whoever set a number needs no warning
    wanted = count * cores.processes
    if busy >= 1 and busy + wanted > cores.processors:
        fix = "" if waiting != "default" else "; start with OMP_WAIT_POLICY=PASSIVE in the environment if they stay"
        yield (
            f"{busy:g} other tasks run on {cores.processors} processors that {wanted} threads want: expect slower "
            f"steps and no reliable times{fix}"
        )


def keep_freed_memory(environment: Mapping[str, str] = os.environ) -> bool:
    """Make glibc's malloc keep freed memory; return whether it does: not with another C library or a user's settings.

    By default the top of the heap returns to the kernel as soon as it is free, and its pages are cleared again for the
    next tensor: a training step takes a seventh longer, for 1 to 5% less memory at its peak (LOG.md). Tensors from 32
    MB on stay mapped one by one: kept, tensors of many sizes would leave holes (30% more memory).
    """
    if any(name.startswith(ALLOCATOR) for name in environment):
        return False
    try:
        library = ctypes.CDLL(None)
        glibc = hasattr(library, "gnu_get_libc_version")
    except (OSError, TypeError):  # no C library to ask
        return False
    settings = ((M_MMAP_THRESHOLD, MMAP_FROM), (M_TRIM_THRESHOLD, TRIM_ABOVE))
    return glibc and all(library.mallopt(*setting) for setting in settings)


def return_freed_memory() -> None:
    """Return freed memory to the kernel now where the C library is glibc, for instance after loading a model."""
    try:
        library = ctypes.CDLL(None)
        if hasattr(library, "malloc_trim"):
            library.malloc_trim(0)
    except (OSError, TypeError):  # no C library to ask
        return
