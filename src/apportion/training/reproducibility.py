"""Everything besides the settings that affects bitwise reproducibility: threads, kernels, versions, processors."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from apportion.distributed import collectives, sharding
from apportion.errors import ConfigError
from apportion.system import cpu
from apportion.training.run_folder import RunFolder


@contextmanager
def deterministic_kernels(device: torch.device) -> Iterator[None]:
    """Have torch use deterministic algorithms inside, on a CPU, where this costs nothing.

    On a GPU some kernels have no deterministic twin and would be errors: a run there
    resumes exactly, but not bitwise.
    """
    if device.type != "cpu":
        yield
        return
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    details: Any = torch.utils.deterministic
    filled = details.fill_uninitialized_memory
    details.fill_uninitialized_memory = False  # else every `torch.empty` is filled first
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        details.fill_uninitialized_memory = filled


def configure_threads(run: RunFolder, wanted: int | None) -> int:
    """Give torch the threads of a run and return their number: what was asked for, else as many as it began with.

    A run that began with more threads than this machine has processors for does not get them.
    """
    begun = collectives.broadcast_object(run.status_fields.get("threads") if run.started else None)
    if wanted is None and begun is not None and begun <= cpu.allowed_processors():
        wanted = int(begun)
    return cpu.set_threads(wanted)


def run_environment(models: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a checkpoint keeps of them, as JSON; `models` by name."""
    factors: dict[str, Any] = {
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": importlib.metadata.version("transformers"),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "onednn": torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled,
        "matmul precision": torch.get_float32_matmul_precision(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "processes": collectives.world_size(),
    }
    if sharding.is_requested():
        factors["weights"] = "sharded"
    for name, model in models.items():
        weight = next(model.parameters())
        place = torch.cuda.get_device_name(weight.device) if weight.device.type == "cuda" else weight.device.type
        factors[f"device of {name}"] = place
        factors[f"dtype of {name}"] = str(weight.dtype).removeprefix("torch.")
        attention = getattr(getattr(model, "config", None), "_attn_implementation", None)
        factors[f"attention of {name}"] = attention
    return factors


def check_devices(before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise ConfigError where a model is on another kind of device than `before`: generators' states fit one kind."""
    for name in (name for name in before if name.startswith("device of ") and name in now):
        was, is_ = _kind(before[name]), _kind(now[name])
        if was != is_:
            fix = f"Pass --device {was}, where there is one, or --fresh to start over."
            raise ConfigError(f"device ({name})", is_, f"{was}, on which this run began", fix)


def _kind(place: str) -> str:
    return place if place in ("cpu", "mps", "xpu") else "cuda"  # GPUs go by their names


def describe_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """Return a warning that names what is not as it was, None when all is."""
    differ = [k for k in sorted({*before, *now}) if before.get(k) != now.get(k)]
    if not differ:
        return None
    changes = "; ".join(f"{name} was {before.get(name)!r} and is {now.get(name)!r}" for name in differ)
    return f"this run's numbers will not be bitwise those of an uninterrupted run: {changes}."
