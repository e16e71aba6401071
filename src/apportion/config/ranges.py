"""What each setting may be, by its name: ranges of numbers, choices of words. Standard library only."""

from __future__ import annotations

import math
from typing import Any

_ANY = math.inf
_COUNTS = ("batch_size", "samples_per_prompt", "rows", "max_new_tokens", "max_prompt_tokens")
RANGES: dict[str, tuple[float, float, str]] = {
    **dict.fromkeys(
        (
            *_COUNTS,
            "epochs",
            "mini_batch",
            "micro_batch",
            "micro_tokens",
            "steps",
            "excerpts",
            "test_texts",
            "count",
            "keep_checkpoints",
            "max_skipped",
        ),
        (1, _ANY, "a whole number >= 1"),
    ),
    "keep_checkpoints": (1, _ANY, "a whole number >= 1"),
    **dict.fromkeys(("rank", "checkpoint_every", "log_rollouts"), (0, _ANY, "a whole number >= 0")),
    "threads": (1, _ANY, "a whole number >= 1, or null"),
    "seed": (0, 2**31, "a whole number from 0 to 2^31"),
    **dict.fromkeys(("lr", "eps", "temperature", "max_grad_norm", "alpha"), (1e-12, _ANY, "a number > 0")),
    **dict.fromkeys(("weight_decay", "value_coef", "disk_wait"), (0, _ANY, "a number >= 0")),
    "clip": (1e-6, _ANY, "a number > 0"),
    "value_clip": (1e-6, _ANY, "a number > 0, or null"),
    **dict.fromkeys(("warmup", "lam"), (0, 1, "a number in [0, 1]")),
    **dict.fromkeys(("samples", "batch"), (2, _ANY, "a whole number >= 2")),
    "width": (8, _ANY, "a whole number >= 8"),
    "timeout": (1e-3, _ANY, "a number of seconds > 0, or null"),
    "truncation_penalty": (-_ANY, _ANY, "a finite number"),
}
NAMES = {  # field -> (what is expected, the fix), where more can be said than that it is a name or a path
    "reward_model": (
        "a folder or hub id of a sequence classifier",
        "Train one with `apportion reward`, then pass --reward_model runs/reward/final.",
    ),
}
_ON = ("off", "warn", "stop")
CHOICES: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("negative_kl", "sampler_gap", "ratio", "value_loss"), _ON),
    **dict.fromkeys(("kl", "entropy", "length", "reward"), (*_ON, "raise_kl_coef")),
    "stop": ("length", "eos"),
    "value_model": ("shared", "separate", "reward"),
    "value_tokens": (None, "first", "all"),
    "truncated": (None, "terminal", "bootstrap", "mask", "penalty"),
    "dtype": ("auto", "float32", "bfloat16"),
    "reward_dtype": ("auto", "float32", "bfloat16"),
    "device": ("auto", "cpu", "cuda"),
    "moments": ("float32", "bfloat16"),
}
