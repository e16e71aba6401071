"""Processor cores: how many are really free, and torch's threads, waiting and allocator set to suit them.

Standard library only. OpenMP reads how threads wait from the environment, once, when torch loads it: `before_torch`
must run first, which `apportion/__init__.py` sees to for the command line. The rest can be set later (`settle`).
"""

from __future__ import annotations

import ctypes
import math
import os
import statistics
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from apportion.errors import ConfigError

# threads that sleep at once when they wait. libgomp otherwise looks 300,000 times first: quicker on cores of one's own
# (a training step by 10%, decoding by 30%), and on a core that something else uses the thread that is waited for cannot
# run meanwhile (2 to 3 times slower, LOG.md). Numbers of looks in between were no better than either
WAITING = {"OMP_WAIT_POLICY": "PASSIVE", "KMP_BLOCKTIME": "0"}
ASKED = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")  # any of these set: the user has decided
COUNTS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
SAMPLES, APART = 5, 0.01  # looks at the run queue, seconds between them
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
MAPPED, KEPT = 32 << 20, 2**31 - 1  # bytes: mmap from here on, trim above that; the largest that mallopt takes
ALLOCATOR = ("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD")  # beginnings of what says that the user has decided


@dataclass(frozen=True)
class Cores:
    """What was found of this process's share of the machine.

    Attributes:
        logical: processors that the machine has online. allowed: those this process may run on (affinity).
        physical: cores among the allowed ones, siblings of one core counted once.
        quota: processors' worth of time that the control groups grant; None for no limit.
        load: tasks that ran or waited to, mean over the last minute, this process's and others'; None where unknown.
        processes: workers that share these cores on this machine.
        threads: what is left for this one. why: how that came, in a line.
    """

    logical: int
    allowed: int
    physical: int
    quota: float | None
    load: float | None
    processes: int
    threads: int
    why: str


@dataclass(frozen=True)
class Settled:
    """What `settle` did: the threads in use, where the number came from, how threads wait, and warnings for the log."""

    threads: int
    source: str
    waiting: str
    cores: Cores
    warnings: tuple[str, ...] = ()

    def record(self) -> dict[str, Any]:
        """Return what a run folder keeps of it."""
        return {"threads": self.threads, "source": self.source, "waiting": self.waiting, "why": self.cores.why}


def available(root: Path = Path("/"), environment: Mapping[str, str] = os.environ) -> Cores:
    """Return the cores that this process may really use, and why that many.

    The smallest of: cores in its affinity (hyper-threads of one core do the same work twice as slowly, so they count
    once), and whole processors in the quota of its control groups (version 1 and 2, up to the root). Workers that a
    launcher started on this machine (LOCAL_WORLD_SIZE, else WORLD_SIZE where it names no other) share them evenly,
    unless each was given cores of its own.

    Args:
        root: where /proc and /sys are looked for.
    """
    allowed = affinity()
    physical = physical_cores(allowed, root)
    quota = cgroup_quota(root)
    logical = max(os.cpu_count() or 1, len(allowed))
    said = [f"{physical} cores"]
    if len(allowed) < logical:
        said[0] += f" in its affinity ({len(allowed)} of {logical} processors)"
    elif physical < len(allowed):
        said[0] += f" ({len(allowed)} hyper-threads)"
    threads = physical
    if quota is not None and math.floor(quota) < threads:
        threads = max(1, math.floor(quota))  # part of a core would make every thread wait for the throttled one
        said.append(f"a quota of {quota:.3g} of them")
    processes = local_processes(environment)
    if processes > 1 and len(allowed) == logical:  # with an affinity of its own, a worker's share is cut already
        threads = max(1, threads // processes)
        said.append(f"shared by {processes} processes")
    return Cores(logical, len(allowed), physical, quota, load(root), processes, threads, ", ".join(said))


def affinity() -> set[int]:
    """Return the numbers of the processors that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return set(os.sched_getaffinity(0))
    return set(range(os.cpu_count() or 1))


def physical_cores(processors: Iterable[int], root: Path = Path("/")) -> int:
    """Return how many cores the `processors` lie on; each counts as one where the system does not say."""
    cores = set()
    for number in processors:
        topology = root / f"sys/devices/system/cpu/cpu{number}/topology"
        siblings = _read(topology / "core_cpus_list") or _read(topology / "thread_siblings_list")
        cores.add(siblings or f"{number}")
    return max(1, len(cores))


def cgroup_quota(root: Path = Path("/")) -> float | None:
    """Return the processors' worth of time that this process's control groups grant, None for no limit.

    The tightest limit on the way from its group to the root counts. In a container without a namespace of its own the
    group's path is not mounted: then the mount itself is its group.
    """
    limits = []
    for folder, mount, version in _groups(root):
        while True:
            limit = _limit_v2(folder) if version == 2 else _limit_v1(folder)
            limits += [] if limit is None else [limit]
            if folder == mount or mount not in folder.parents:
                break
            folder = folder.parent
    return min(limits, default=None)


def _groups(root: Path) -> list[tuple[Path, Path, int]]:
    """Return (folder, mount point, version) of every control group with a processor limit that this process is in."""
    paths: dict[str, str] = {}
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        for name in controllers.split(","):
            paths[name] = path  # "" is version 2
    found = []
    for line in _read(root / "proc/self/mountinfo").splitlines():
        before, _, after = line.partition(" - ")
        inside, place = before.split()[3:5]
        kind, _, options = [*after.split(), "", "", ""][:3]
        controller = {"cgroup": "cpu", "cgroup2": ""}.get(kind)
        if controller is None or controller not in paths or (controller and "cpu" not in options.split(",")):
            continue
        mount = root / place.lstrip("/")
        path = paths[controller]
        below = path[len(inside) :] if inside != "/" and f"{path}/".startswith(f"{inside}/") else path
        folder = mount / below.strip("/")
        inner = ".." not in folder.parts and folder.is_dir()
        found.append((folder if inner else mount, mount, 1 if controller else 2))
    return found


def _limit_v2(folder: Path) -> float | None:
    words = _read(folder / "cpu.max").split()  # "max 100000" or "150000 100000", microseconds
    if len(words) != 2 or words[0] == "max":
        return None
    return int(words[0]) / int(words[1])


def _limit_v1(folder: Path) -> float | None:
    quota, period = _read(folder / "cpu.cfs_quota_us"), _read(folder / "cpu.cfs_period_us")
    if not quota or not period or int(quota) <= 0:  # -1: no limit
        return None
    return int(quota) / int(period)


def load(root: Path = Path("/")) -> float | None:
    """Return the tasks that ran or waited to run, mean over the last minute, or None where that is not told."""
    words = _read(root / "proc/loadavg").split()
    return float(words[0]) if words else None


def others_running(root: Path = Path("/")) -> float:
    """Return how many tasks other than this one run or wait to run just now, the median of a few looks."""
    counts = []
    for look in range(SAMPLES):
        if look:
            time.sleep(APART)
        words = _read(root / "proc/loadavg").split()
        counts.append(int(words[3].partition("/")[0]) - 1 if len(words) > 3 else 0)
    return statistics.median(counts)


def local_processes(environment: Mapping[str, str] = os.environ) -> int:
    """Return how many workers a launcher started on this machine; 1 when none did."""
    for name in ("LOCAL_WORLD_SIZE", "WORLD_SIZE"):
        if name == "WORLD_SIZE" and "LOCAL_RANK" not in environment:
            continue  # one worker a machine, for all that is known
        if environment.get(name, "").isdigit():
            return max(1, int(environment[name]))
    return 1


def before_torch(root: Path = Path("/"), environment: Any = os.environ) -> str:
    """Have OpenMP's threads sleep while they wait if other tasks want the cores; return how they wait.

    "passive": they sleep, as is put into the environment here. "user": as the environment said already. "default":
    OpenMP's own way, they look for work a while; the cores are free, or torch is loaded and it is too late.
    """
    if all(environment.get(name) == value for name, value in WAITING.items()):
        return "passive"
    if any(name in environment for name in ASKED):
        return "user"
    if "torch" in sys.modules:
        return "default"
    cores = available(root, environment)
    if others_running(root) + cores.threads * cores.processes <= cores.logical:
        return "default"
    environment.update(WAITING)
    return "passive"


def is_command(words: Iterable[str] | None = None) -> bool:
    """Return whether this process is the command line: `apportion …` or `python -m apportion …`.

    A library that is imported into somebody else's program leaves their environment alone.
    """
    words = list(getattr(sys, "orig_argv", sys.argv) if words is None else words)
    module = ("-m", "apportion") in pairwise(words)
    return module or any(Path(word).stem == "apportion" for word in words[:3] if not word.startswith("-"))


def settle(threads: int | None = None, *, root: Path = Path("/")) -> Settled:
    """Give torch its threads and return what was done; the environment that the user set is left as it is.

    Where torch is not loaded yet, the environment tells it, and how threads wait is settled as well.

    Args:
        threads: how many; None takes OMP_NUM_THREADS where it is set, else what `available` finds.

    Raises:
        ConfigError: fewer than 1.
    """
    if threads is not None and (type(threads) is not int or threads < 1):
        raise ConfigError("threads", threads, "a whole number >= 1, or null", "Leave it out to detect them.")
    cores, told = available(root), _told()
    waiting = before_torch(root)
    count, source = cores.threads, "detected"
    if threads is not None:
        count, source = threads, "--threads"
    elif told is not None:
        count, source = told[1], told[0]
    torch = sys.modules.get("torch")
    if torch is None:  # it will read them
        for name in COUNTS:
            os.environ.setdefault(name, str(count))
    elif told is None or threads is not None:
        use(count)
    else:
        count = torch.get_num_threads()  # MKL may have held it to the cores that there are
    return Settled(count, source, waiting, cores, tuple(_warnings(cores, count, source, waiting, root)))


def use(threads: int | None) -> int:
    """Give torch `threads` where that is a number, and return the threads that it uses now: what a run records."""
    import torch

    if threads is not None and torch.get_num_threads() != threads:
        torch.set_num_threads(threads)
    return torch.get_num_threads()


def _told() -> tuple[str, int] | None:
    """Return (variable, threads) of the first that the user's environment has."""
    for name in COUNTS:
        first = os.environ.get(name, "").split(",")[0].strip()  # one number a nesting level
        if first.isdigit() and int(first) > 0:
            return name, int(first)
    return None


def _warnings(cores: Cores, count: int, source: str, waiting: str, root: Path) -> list[str]:
    found = []
    free = cores.threads if cores.processes > 1 else min(cores.allowed, math.ceil(cores.quota or cores.allowed))
    if count > free:
        found.append(f"{count} threads ({source}) on {cores.why}: they will wait for one another; use --threads {free}")
    if count == 1 < cores.threads and cores.processes > 1 and source in COUNTS:
        found.append(f"{source}=1, which torchrun sets unasked; use --threads {cores.threads}, which are free")
    busy = others_running(root) if source == "detected" else 0  # who chose a number need not be told
    if busy >= 1 and busy + count * cores.processes > cores.logical:
        said = f"{busy:g} other tasks run on {cores.logical} processors that {count * cores.processes} threads want"
        fix = "" if waiting != "default" else "; start with OMP_WAIT_POLICY=PASSIVE in the environment if they stay"
        found.append(f"{said}: expect slower steps and no reliable times{fix}")
    return found


def keep_memory(environment: Mapping[str, str] = os.environ) -> bool:
    """Tell glibc's malloc to keep what is freed; return whether it will (False: another C library, or the user's way).

    By default the top of the heap goes back to the system as soon as it is free, and the kernel clears its pages again
    for the next tensor: a training step takes a seventh longer, for 1 to 5% less memory at its peak (LOG.md). From 32
    MB on a tensor is still mapped by itself: kept, tensors of many sizes leave holes (30% more memory).
    """
    if any(name.startswith(ALLOCATOR) for name in environment):
        return False
    try:
        library = ctypes.CDLL(None)
        glibc = hasattr(library, "gnu_get_libc_version")
    except (OSError, TypeError):  # no C library to ask
        return False
    return glibc and all(library.mallopt(*pair) for pair in ((M_MMAP_THRESHOLD, MAPPED), (M_TRIM_THRESHOLD, KEPT)))


def return_memory() -> None:
    """Give freed memory back to the system now, where the C library is glibc: after a model was loaded, for one."""
    try:
        library = ctypes.CDLL(None)
        if hasattr(library, "malloc_trim"):
            library.malloc_trim(0)
    except (OSError, TypeError):  # no C library to ask
        return


def _read(path: Path) -> str:
    """Return the text of a small system file, "" where there is none or it may not be read."""
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return ""
