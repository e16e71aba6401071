"""The model that sft and dpo train: loaded, with the settings of its adapters."""

from __future__ import annotations

from typing import Any

import torch

from apportion.config import TrainerConfig
from apportion.errors import ModelError
from apportion.models.families import freeze_other_parts
from apportion.models.loading import load_causal, pick_device, pick_dtype, use_fastest_attention
from apportion.models.lora import adapter_settings
from apportion.models.text.render import check_embeddings
from apportion.models.tokenizers import needed_rows
from apportion.stages.supervised.rows import Start

SEPARATE = 0.02  # of the largest logit: what packing may change by rounding


def load_model(config: TrainerConfig, start: Start) -> tuple[Any, Any]:
    """Return (the model to train, peft's settings of its adapters or None where all weights are trained).

    The base of adapters is in the dtype that it computes in; weights that are all trained are float32.

    Raises:
        ModelError, ConfigError: as `load_causal` and `adapter_settings`.
    """
    device, lora = pick_device(config.device), config.lora.rank > 0
    dtype = pick_dtype(config.dtype, device) if lora else torch.float32
    rows = needed_rows(start.tokenizer, config.pad_token)
    model: Any = load_causal("model", start.folder, dtype, device, fast_kernels=config.fast_kernels, rows=rows)
    check_embeddings("model", model, start.tokenizer)
    if config.fast_kernels:
        use_fastest_attention(model, device, config.max_length)
    freeze_other_parts(model)
    return model, adapter_settings(model, config.lora) if lora else None


@torch.no_grad()
def check_packing(model: Any) -> None:
    """Raise ModelError for a model in which packed rows attend to one another, tried on two rows of four tokens."""
    ids = torch.tensor([[5, 9, 7, 8, 6, 5, 9, 8]], device=next(model.parameters()).device)
    ids = ids % model.get_input_embeddings().weight.shape[0]
    positions = torch.arange(4, device=ids.device).repeat(2)[None]
    alone = model(input_ids=ids[:, 4:], use_cache=False).logits.float()
    packed = model(input_ids=ids, position_ids=positions, use_cache=False).logits[:, 4:].float()
    gap = float((packed - alone).abs().max() / alone.abs().max().clamp_min(1.0))
    if not gap <= SEPARATE:
        got = f"{type(model).__name__}, in which a packed row changes the logits of the next by {gap:.2g}"
        fix = "Leave packing off for this model."
        raise ModelError("packing", got, "a model that keeps packed rows apart by their positions", fix)
