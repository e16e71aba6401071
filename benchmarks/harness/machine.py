"""Description of the machine, and its matmul rates and read bandwidth when nothing else runs."""

from __future__ import annotations

import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

from apportion.system import cpu

ISA = ("avx2", "fma", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16", "amx_int8")
ARM = ("asimd", "sve", "sve2", "bf16", "i8mm")
SIZES = (1024, 2048, 4096)
BUFFER = 500_000_000  # bytes


def describe() -> dict[str, Any]:
    """Return the machine: processor, cores, instruction sets, memory (GB), GPU, and the packages' versions."""
    import psutil

    name, flags = processor()
    cuda = torch.cuda.is_available()
    return {
        "cpu": name,
        "cores": os.cpu_count(),
        "usable_cores": cpu.available_cores().count,
        "isa": [flag for flag in (*ISA, *ARM) if flag in flags],
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "gpu": torch.cuda.get_device_name() if cuda else None,
        "gpu_memory_gb": round(torch.cuda.get_device_properties(0).total_memory / 1e9, 1) if cuda else None,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "packages": package_versions(),
    }


def package_versions() -> dict[str, str]:
    """Return the installed versions of the packages that determine the speed of a batch."""
    from importlib.metadata import PackageNotFoundError, version

    versions = {}
    for name in ("torch", "transformers", "peft", "accelerate", "numpy"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


def processor() -> tuple[str, set[str]]:
    """Return the processor's name and its flags; outside Linux, Python's name for it and no flags."""
    file = Path("/proc/cpuinfo")
    if not file.is_file():
        return platform.processor() or platform.machine(), set()
    lines = [line.partition(":") for line in file.read_text().splitlines()]
    values = {key.strip().lower(): value.strip() for key, _, value in reversed(lines)}  # of the first processor
    return values.get("model name", platform.machine()), set(values.get("flags", values.get("features", "")).split())


def matmul_rate(
    dtype: torch.dtype, *, device: str = "cpu", seconds: float = 0.4, sizes: Sequence[int] = SIZES
) -> float:
    """Return FLOP/s of square matrix products in `dtype`: the median of each of several sizes, and the best of those.

    Args:
        seconds: minimum time of each size, after two warm-up products; at least five products each.
    """
    rates = []
    for size in sizes:
        left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        out = torch.empty_like(left)
        rates.append(2 * size**3 / _median_time(partial(torch.mm, left, right, out=out), seconds, device))
    return max(rates)


def read_bandwidth(*, device: str = "cpu", seconds: float = 0.4) -> float:
    """Return bytes/s of reading a warm preallocated 0.5 GB buffer of float32: the median of sums over it."""
    buffer = torch.ones(BUFFER // 4, device=device)
    return BUFFER / _median_time(lambda: buffer.sum(), seconds, device)


def rates(device: str = "cpu", threads: int | None = None) -> dict[str, float]:
    """Return the matmul rates in float32 and bfloat16 (FLOP/s) and the read bandwidth (bytes/s), on `threads`."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        return {
            "float32_flops": matmul_rate(torch.float32, device=device),
            "bfloat16_flops": matmul_rate(torch.bfloat16, device=device),
            "read_bytes": read_bandwidth(device=device),
        }
    finally:
        torch.set_num_threads(before)


def _median_time(call: Callable[[], Any], seconds: float, device: str) -> float:
    """Return the median seconds of `call`, repeated at least five times and for `seconds`."""

    def once() -> float:
        began = time.perf_counter()
        call()
        if device != "cpu":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    once(), once()
    times: list[float] = []
    while len(times) < 5 or (sum(times) < seconds and len(times) < 10_000):
        times.append(once())
    return median(times)


if __name__ == "__main__":
    import json

    sys.stdout.write(json.dumps(describe() | rates(threads=cpu.available_cores().count), indent=2) + "\n")
