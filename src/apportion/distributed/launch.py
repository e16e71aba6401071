"""Checks of the launcher's settings: what `accelerate launch` was configured for and a run would not do."""

from __future__ import annotations

import os

import torch

from apportion.errors import ConfigError

# a variable of `accelerate launch` -> the value with which a run does as configured, the option, the fix
FSDP2 = "recipes/accelerate/fsdp2_gpu.yaml"
UNSUPPORTED = {
    "ACCELERATE_USE_DEEPSPEED": ("false", "DeepSpeed", f"Launch with {FSDP2}, which shares weights as ZeRO-3 does."),
    "ACCELERATE_USE_MEGATRON_LM": ("false", "Megatron-LM", f"Launch with {FSDP2}, or ddp_gpu.yaml beside it."),
    "ACCELERATE_USE_PARALLELISM_CONFIG": ("false", "a parallelism config", "Launch without it."),
    "ACCELERATE_MIXED_PRECISION": ("no", "mixed precision", "Set mixed_precision: no there, and --dtype here."),
    "ACCELERATE_DYNAMO_BACKEND": ("no", "a dynamo backend", "Set dynamo_backend: no there."),
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": ("1", "gradient accumulation", "Set --ppo.mini_batch and micro_batch."),
}
# the same for FSDP: options of its first version that accelerate itself ignores with the second are left out
FSDP_OPTIONS = {
    "FSDP_VERSION": (("2",), "fsdp_version", "Set fsdp_version: 2"),
    "FSDP_RESHARD_AFTER_FORWARD": (("true", "false"), "fsdp_reshard_after_forward", "Set true or false"),
    "FSDP_OFFLOAD_PARAMS": (("false",), "fsdp_offload_params", "Set fsdp_offload_params: false"),
    "FSDP_CPU_RAM_EFFICIENT_LOADING": (
        ("false",),
        "fsdp_cpu_ram_efficient_loading",
        "Set fsdp_cpu_ram_efficient_loading: false: each process loads the models",
    ),
    "FSDP_ACTIVATION_CHECKPOINTING": (("false",), "fsdp_activation_checkpointing", "Set --ppo.micro_tokens instead"),
    "FSDP_AUTO_WRAP_POLICY": (
        ("transformer_based_wrap",),
        "fsdp_auto_wrap_policy",
        "Leave it out: each layer of a model is gathered on its own",
    ),
    "FSDP_TRANSFORMER_CLS_TO_WRAP": ((), "fsdp_transformer_layer_cls_to_wrap", "Leave it out: it is found by itself"),
    "FSDP_FORWARD_PREFETCH": (("false",), "fsdp_forward_prefetch", "Set fsdp_forward_prefetch: false"),
    "FSDP_STATE_DICT_TYPE": (
        ("full_state_dict",),
        "fsdp_state_dict_type",
        "Leave it out: checkpoints hold whole weights, for any number of processes",
    ),
    "FSDP_IGNORED_MODULES": ((), "fsdp_ignored_modules", "Leave it out"),
}
FSDP_NEEDS = ("set_force_sum_reduction_for_comms", "reset_iter_state")  # beyond torch 2.6
FSDP_DEFAULTS = {"FSDP_VERSION": "1", "FSDP_CPU_RAM_EFFICIENT_LOADING": "false"}  # where the variable is not set


def check_launch() -> None:
    """Raise ConfigError for a setting of the launcher that would be ignored."""
    # accelerate starts a single process here, with the address of a group that no other process joins
    if "ACCELERATE_USE_CPU" in os.environ and "MASTER_PORT" in os.environ and "LOCAL_RANK" not in os.environ:
        expected = "as many processes as --num_processes: without several GPUs accelerate leaves them to MPI"
        fix = "Add --multi_gpu (it needs no GPU), or use recipes/accelerate/ddp_cpu.yaml or torchrun."
        raise ConfigError("accelerate launch", "one process", expected, fix)
    for name, (plain, what, fix) in UNSUPPORTED.items():
        got = os.environ.get(name, plain).lower()
        if got != plain:
            expected = f"{plain!r}: apportion's processes are plain data-parallel ones"
            raise ConfigError(f"accelerate's {what} ({name})", got, expected, fix)
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        check_fsdp()


def check_fsdp() -> None:
    """Raise ConfigError for an option of FSDP that would be ignored, and where torch is too old for it."""
    for name, (allowed, option, fix) in FSDP_OPTIONS.items():
        got = os.environ.get(name, FSDP_DEFAULTS.get(name))
        if got is not None and got.lower() not in allowed:
            expected = " or ".join(map(repr, allowed)) if allowed else "none"
            raise ConfigError(f"accelerate's {option}", got, expected, f"{fix}, as {FSDP2} does.")
    from torch.distributed.fsdp import FSDPModule

    lacks = [name for name in FSDP_NEEDS if not hasattr(FSDPModule, name)]
    if lacks:
        fix = "Update torch, or launch with recipes/accelerate/ddp_gpu.yaml."
        raise ConfigError("torch", torch.__version__, f"one whose FSDP2 has {' and '.join(lacks)}", fix)
