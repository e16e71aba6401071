"""Several responses to one prompt in two forwards: the prompt once, then every response with its keys and values.

With K samples of P prompt and R response tokens a model computes P + K·R positions instead of K·(P + R); gradients of
all responses flow back through the one prompt. It works on any model whose layers cache plain keys and values.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from apportion.models.families import bare
from apportion.types import Rollouts

SAVING = 0.2  # least part of the positions that sharing must save to outweigh the second forward

Run = Callable[..., Tensor]  # (keep, **inputs) -> the last `keep` states (n,keep,d)


class Shared(NamedTuple):
    """The distinct prompts of a batch: one row of each (U,), and the prompt index of each row (B,), from 0 to U − 1."""

    first: Tensor
    prompt: Tensor


def shared_prompts(rollouts: Rollouts) -> Shared | None:
    """Return the distinct prompts, by `group`, or None where sharing saves too little."""
    rows, length = rollouts.prompt_ids.shape
    _, prompt = torch.unique(rollouts.group, return_inverse=True)
    count = int(prompt.max()) + 1 if rows else 0
    if (rows - count) * length < SAVING * rows * (length + rollouts.response_ids.shape[1]):
        return None
    numbers = torch.arange(rows, device=prompt.device)
    first = numbers.new_full((count,), rows).scatter_reduce_(0, prompt, numbers, "amin")
    equal_ids = torch.equal(rollouts.prompt_ids[first[prompt]], rollouts.prompt_ids)
    equal_masks = torch.equal(rollouts.prompt_mask[first[prompt]], rollouts.prompt_mask)
    return Shared(first, prompt) if equal_ids and equal_masks else None


def can_share(model: Any) -> bool:
    """Whether every layer of `model` caches the keys and values of all positions, and nothing else."""
    from transformers import DynamicCache

    text = model.config.get_text_config()
    kinds = {type(layer).__name__ for layer in DynamicCache(config=model.config).layers}
    window = getattr(text, "use_sliding_window", True) and getattr(text, "sliding_window", None)
    return kinds <= {"DynamicLayer"} and not window and getattr(text, "model_type", "") not in NO_CACHE


def has_past(model: Any) -> bool:
    """Whether the model's forward takes `past_key_values`: a recurrent one may ignore them."""
    return "past_key_values" in inspect.signature(bare(model).forward).parameters


NO_CACHE = ("mamba", "mamba2", "rwkv", "recurrent_gemma", "bloom")  # bloom's biases count columns, pads included


def states_after_shared_prompts(run: Run, rollouts: Rollouts, shared: Shared) -> Tensor:
    """Return the states (B,T+1,d) before each response token and after the last, each distinct prompt computed once."""
    last, past = prefill_prompts(run, rollouts, shared)
    rest = run(rollouts.response_ids.shape[1], **response_inputs(rollouts, past))  # (B,T,d)
    return torch.cat([last, rest], dim=1)


def prefill_prompts(run: Run, rollouts: Rollouts, shared: Shared) -> tuple[Tensor, Any]:
    """Return (last state (B,1,d) of each prompt, every row's keys and values), each distinct prompt computed once."""
    from transformers import DynamicCache

    mask = rollouts.prompt_mask[shared.first].long()
    cache, past = DynamicCache(), DynamicCache()
    positions = (mask.cumsum(dim=1) - 1).clamp_min(0)
    inputs = {"input_ids": rollouts.prompt_ids[shared.first], "attention_mask": mask, "position_ids": positions}
    last = run(1, **inputs, past_key_values=cache, use_cache=True)  # (U,1,d)
    layer: Any
    for number, layer in enumerate(cache.layers):
        past.update(layer.keys[shared.prompt], layer.values[shared.prompt], number)
    return last[shared.prompt], past


def response_inputs(rollouts: Rollouts, past: Any) -> dict[str, Any]:
    """Return the model inputs for the responses, given `past`, the prompts' keys and values."""
    mask = torch.cat([rollouts.prompt_mask, rollouts.valid], dim=1).long()
    positions = (mask.cumsum(dim=1) - 1).clamp_min(0)[:, -rollouts.response_ids.shape[1] :]
    ids = {"input_ids": rollouts.response_ids, "attention_mask": mask, "position_ids": positions}
    return {**ids, "past_key_values": past, "use_cache": True}
