"""Checks of the machine: device, number format, threads, memory and disk space."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from apportion.config import reward_path
from apportion.models.loading import has_bfloat16, pick_device, pick_dtype
from apportion.models.pretrained import NO_CODE
from apportion.stages.doctor.case import Case
from apportion.stages.doctor.checks import footprint
from apportion.stages.doctor.findings import Result, fail, grade, ok, warn

GB = 1e9
SMALLER = "Lower ppo.micro_batch, sampling.rows or sampling.max_new_tokens, or train adapters (lora.rank 16)."


def processor(case: Case) -> Result:
    """The device exists, supports the requested number format, and has a core for each thread."""
    config, threads = case.config, case.threads
    device = pick_device(config.device)
    dtype = pick_dtype(config.dtype, device)
    named = str(dtype).removeprefix("torch.")
    message = f"{device.type} in {named}"
    if hasattr(config, "reward_dtype"):
        message = f"{message}, reward model in {config.reward_dtype}"
    requested = {name: getattr(config, name, None) for name in ("dtype", "reward_dtype")}
    slow = [name for name, wanted in requested.items() if wanted == "bfloat16" and not has_bfloat16(device)]
    if threads is not None:
        message = f"{message}; {threads.count} threads ({threads.source})"
        if threads.warnings:
            return warn(f"{message}: {threads.warnings[0]}", "Leave --threads and OMP_NUM_THREADS out, or lower them.")
    if slow:
        return warn(f"{message}; no native bfloat16", f"Set {slow[0]} to auto or float32: bfloat16 is slower.")
    return ok(message)


def memory(case: Case) -> Result:
    """The estimated peak memory of the run fits into free memory."""
    device = pick_device(case.config.device)
    parts = footprint.memory(
        policy_shape(case), reward_shape(case), case.config, case.longest, pick_dtype(case.config.dtype, device)
    )
    if device.type == "cuda":
        parts["libraries"] = 0.5e9
    need, free = footprint.total(parts), free_memory(device)
    return fits(parts, need, free, SMALLER)


def fits(parts: dict[str, float], need: float, free: float, fix: str) -> Result:
    """Grade an estimate of `need` bytes, of which `parts` are named, against the `free` ones."""
    largest = sorted(parts.items(), key=lambda part: -part[1])[:3]
    named = ", ".join(f"{name} {value / GB:.2g}" for name, value in largest)
    message = f"about {need / GB:.2g} GB ({named}) of {free / GB:.3g} GB free"
    return grade(need / free, (0.8, 1.2), message, fix)


def free_memory(device: torch.device) -> float:
    """Return the bytes that this process can still allocate on `device`, within its control group."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    import psutil

    free = float(psutil.virtual_memory().available)
    granted, used = (Path("/sys/fs/cgroup") / name for name in ("memory.max", "memory.current"))
    if granted.is_file() and used.is_file() and granted.read_text().strip().isdigit():
        free = min(free, float(granted.read_text()) - float(used.read_text()) + reclaimable())
    return free


def reclaimable() -> float:
    """Return the bytes of cached file pages that the control group counts and can reclaim."""
    statistics = Path("/sys/fs/cgroup/memory.stat")
    lines = statistics.read_text().splitlines() if statistics.is_file() else []
    return sum(float(line.split()[1]) for line in lines if line.split()[0] in ("inactive_file", "active_file"))


def disk(case: Case) -> Result:
    """The final model and the checkpoints fit on the disk of the output folder."""
    shape, models = policy_shape(case), 1 if case.config.ppo.value_model == "shared" else 2
    need = footprint.disk(shape.weights, models * footprint.trainable(shape, case.config), case.config)
    return room(case.config.output, need)


def room(output: str, need: float) -> Result:
    """Check that `need` bytes are free on the disk of the folder `output`, which may not exist yet."""
    place = Path(output).expanduser().absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    message = f"about {need / GB:.2g} GB of {free / GB:.3g} GB free at {output}"
    fix = "Free some space, keep fewer checkpoints (--keep_checkpoints 1), or choose another --output."
    return fail(message, fix) if need + 0.2 * GB > free else grade(need / free, (0.8, 1.0), message, fix)


def policy_shape(case: Case) -> footprint.Shape:
    """Return the policy's shape."""
    return footprint.shape_of(case.policy_settings, weights_of(case, "policy"))


def reward_shape(case: Case) -> footprint.Shape:
    """Return the reward model's shape: the policy's while it was not opened, no weights where no reward is a model."""
    if case.reward_settings is None:
        shape = policy_shape(case)
        absent = hasattr(case.config, "rewards") and reward_path(case.config) is None
        return shape._replace(weights=0, hidden=0, inner=0) if absent else shape
    return footprint.shape_of(case.reward_settings, weights_of(case, "reward"))


def weights_of(case: Case, which: str) -> int:
    """Return the number of weights of a model: from its files, or from an empty model of the same settings."""
    folder, settings = getattr(case, f"{which}_folder"), getattr(case, f"{which}_settings")
    stored = footprint.stored_weights(folder)
    if stored is not None:
        return stored
    from transformers import AutoModel

    with torch.random.fork_rng(devices=[]), torch.device("meta"):  # leaves the run's random state unchanged
        return int(AutoModel.from_config(settings, attn_implementation="sdpa", **NO_CODE).num_parameters())
