"""Estimate of a run's memory and disk use from its settings and the shapes of its models, without loading weights."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

import torch

from apportion.config import RLConfig, TrainerConfig
from apportion.models.files import is_adapter, stored_shapes
from apportion.models.loading import SHORT

LIBRARIES = 0.7e9  # bytes of Python, torch and transformers before any model
BLOCK = 1 << 24  # logits computed at a time
SAVED = 1 << 26  # logits saved for the backward pass, at most


class Shape(NamedTuple):
    """The sizes that a model's memory depends on: the number of `weights`, and figures of its configuration."""

    weights: int
    layers: int
    hidden: int
    inner: int
    heads: int
    shared: int
    head: int
    vocabulary: int


def shape_of(settings: Any, weights: int) -> Shape:
    """Return the shape of a model with these settings and this number of weights."""
    text = settings.get_text_config()

    def read(names: tuple[str, ...], default: int) -> int:
        return int(next((v for v in (getattr(text, name, None) for name in names) if v), default))

    hidden = read(("hidden_size", "n_embd"), 1)
    heads = read(("num_attention_heads", "n_head"), 1)
    return Shape(
        weights,
        read(("num_hidden_layers", "n_layer"), 1),
        hidden,
        read(("intermediate_size", "ffn_dim", "n_inner"), 4 * hidden),
        heads,
        read(("num_key_value_heads",), heads),
        read(("head_dim",), hidden // heads),
        read(("vocab_size",), 1),
    )


def stored_weights(folder: str) -> int | None:
    """Return the number of weights in `folder`, from its safetensors headers; None without whole weights here."""
    if not Path(folder).is_dir() or is_adapter(folder):
        return None
    return sum(math.prod(shape) for shape in stored_shapes(folder).values()) or None


def trainable(shape: Shape, config: RLConfig | TrainerConfig) -> int:
    """Return the approximate number of trainable parameters: LoRA on the targeted linear layers, or all weights."""
    if config.lora.rank == 0:
        return shape.weights
    attention = 2 * shape.hidden + 2 * (shape.heads + shape.shared) * shape.head + 2 * shape.hidden
    units = 3 * (shape.hidden + shape.inner)
    return shape.layers * config.lora.rank * (attention + (0 if config.lora.targets == "attention" else units))


def memory(policy: Shape, reward: Shape, config: RLConfig, longest: int, dtype: torch.dtype) -> dict[str, float]:
    """Return bytes by part: constant parts, and what each phase of a batch adds; only the largest phase counts.

    Accurate to about 25%: activations as the modules of `models/` save them, logits in blocks.
    """
    size, rate = dtype.itemsize, config.reward_dtype
    full, separate = config.lora.rank == 0, config.ppo.value_model != "shared"
    trained = trainable(policy, config) * (2 if separate else 1)
    weights = policy.weights * (4 if full else size)  # in 16 bit, the master weight's other half is stored separately
    weights += policy.weights * size if full else 0  # the reference
    weights += policy.weights * (4 if full else size) if separate else 0
    moments = 4 if config.optim.moments == "bfloat16" and full and size == 2 else 8
    constant = {
        "libraries": LIBRARIES,
        "policy": float(weights),
        "reward model": float(reward.weights * (2 if rate == "bfloat16" else 4)),
        "optimizer": float(trained * (moments + (size if full else 4) + (0 if full else 4))),
    }
    rows = config.sampling.rows or config.sampling.batch_size
    cache = rows * longest * policy.layers * 2 * policy.shared * policy.head * size
    generate = float(cache + 3 * 4 * min(rows, config.sampling.batch_size) * policy.vocabulary)
    update = activations(policy, config, longest, size) * (2 if separate else 1)
    update += 3 * size * min(BLOCK, policy.vocabulary * longest * config.ppo.micro_batch)
    update += size * min(SAVED, policy.vocabulary * config.sampling.max_new_tokens * config.ppo.micro_batch)
    tokens = min(max(config.scores.micro_tokens, longest), config.scores.micro_batch * longest)
    score = float(tokens * (8 * reward.hidden + 3 * reward.inner) * 4)
    return constant | {"generation": generate, "scoring": score, "update": float(update)}


def activations(policy: Shape, config: RLConfig, longest: int, size: int) -> int:
    """Return the bytes that one micro-batch saves for its backward pass."""
    rows = max(1, min(config.ppo.micro_batch, config.ppo.micro_tokens // max(1, longest)))
    tokens = rows * longest
    saved = tokens * (8 * policy.hidden + 3 * policy.inner) * size
    eager = rows * policy.heads * longest**2 * (size + 4) if longest <= SHORT else 0
    return policy.layers * (saved + eager)


def total(parts: dict[str, float]) -> float:
    """Return the peak in bytes: the constant parts and the largest phase."""
    phases = ("generation", "scoring", "update")
    return sum(v for k, v in parts.items() if k not in phases) + max(parts[name] for name in phases)


def disk(weights: int, trained: int, config: RLConfig) -> float:
    """Return the largest size of a run folder in bytes: the final and the best model in float32, and the checkpoints.

    Args:
        weights: of the policy. trained: of them and of the value model.
    """
    every = config.checkpoint_every
    checkpoints = min(config.keep_checkpoints + 1, (config.steps - 1) // every) if every else 0
    models = 3 if config.keep_best.every else 1  # a better one is written before the last best is removed
    return 4.0 * weights * models + 12.0 * trained * checkpoints
