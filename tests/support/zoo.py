"""Tiny random classifiers of every family whose attention is read, on every kernel, with their eager matrices."""

from __future__ import annotations

import pytest
import tiny_models
import torch
from torch import Tensor, nn

from apportion.credit._attention_spec import Layers
from apportion.models.attention.row import AttentionTap, attention_row

WIDE = {**tiny_models.WIDE, "max_position_embeddings": 64}
KEYS = {**WIDE, **tiny_models.SHARED_KEYS}
WINDOW = {"head_dim": 8, "sliding_window": 4}
EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 1}
OPT = {"hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
# name -> (configuration class, settings); the last of three layers is a windowed one where the name says so
CONFIGS: dict[str, tuple[str, dict]] = {
    "gpt2": ("GPT2Config", {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64}),
    "gpt2 (scaled by layer)": (
        "GPT2Config",
        {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64, "scale_attn_by_inverse_layer_idx": True},
    ),
    "gpt-neox (partial rotary)": ("GPTNeoXConfig", {**WIDE, "rotary_pct": 0.5}),
    "opt": ("OPTConfig", {**OPT, "max_position_embeddings": 64}),
    "bloom (alibi)": ("BloomConfig", {"hidden_size": 32, "n_layer": 3, "n_head": 4}),
    "bloom (alibi, 3 heads)": ("BloomConfig", {"hidden_size": 24, "n_layer": 3, "n_head": 3}),
    "llama (grouped queries)": ("LlamaConfig", KEYS),
    "mistral (window)": ("MistralConfig", {**KEYS, "sliding_window": 4}),
    "qwen2": ("Qwen2Config", KEYS),
    "qwen3 (q/k norm)": ("Qwen3Config", {**KEYS, "head_dim": 8}),
    "gemma2 (soft-cap, window)": (
        "Gemma2Config",
        {**KEYS, **WINDOW, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 5},
    ),
    "gemma2 (soft-cap, full)": (
        "Gemma2Config",
        {**KEYS, **WINDOW, "attn_logit_softcapping": 2.0, "num_hidden_layers": 2},
    ),
    "gemma3 (window)": (
        "Gemma3TextConfig",
        {**KEYS, **WINDOW, "query_pre_attn_scalar": 1, "layer_types": ["full_attention", *["sliding_attention"] * 2]},
    ),
    "gemma3 (full)": (
        "Gemma3TextConfig",
        {**KEYS, **WINDOW, "query_pre_attn_scalar": 1, "layer_types": [*["sliding_attention"] * 2, "full_attention"]},
    ),
    "phi3": ("Phi3Config", {**KEYS, "bos_token_id": 1, "eos_token_id": 2}),
    "gpt-oss (sinks, window)": ("GptOssConfig", {**KEYS, **WINDOW, **EXPERTS}),
    "gpt-oss (sinks, full)": ("GptOssConfig", {**KEYS, **WINDOW, **EXPERTS, "num_hidden_layers": 2}),
    "bert": ("BertConfig", WIDE),
    "roberta": ("RobertaConfig", WIDE),
}
ENCODERS = ("bert", "roberta")
REFUSED: dict[str, tuple[str, dict]] = {
    "deberta": ("DebertaConfig", {**WIDE, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]}),
    "deberta-v2": ("DebertaV2Config", {**WIDE, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]}),
}
KERNELS = ("eager", "sdpa", "flex_attention", "flash_attention_2")
PADDINGS = ("none", "left", "right", "both")


def build(
    name: str, implementation: str = "eager", *, labels: int = 2, length: int = 64, **changes: object
) -> nn.Module:
    """Return a random classifier of that architecture, float32, in evaluation mode; always with the same weights."""
    import transformers

    kind, settings = (CONFIGS | REFUSED)[name]
    places = {"max_position_embeddings": length + 2} if "max_position_embeddings" in settings else {}
    places |= {"n_positions": length} if "n_positions" in settings else {}
    settings = {**tiny_models.COMMON, **settings, **places, **changes}
    config = getattr(transformers, kind)(**settings, num_labels=labels)
    factory = transformers.AutoModelForSequenceClassification
    torch.manual_seed(0)
    model = factory.from_config(config, attn_implementation=implementation).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3 + (parameter if parameter.dim() == 1 else 0.0))
    return model


def on(name: str, implementation: str, **settings: object) -> nn.Module:
    """Return the model with this kernel; skip where the family or this device has none, and say why."""
    if implementation.startswith("flash"):
        if not torch.cuda.is_available():
            pytest.skip("flash attention needs a CUDA device")
        pytest.importorskip("flash_attn", reason="the flash-attn package is not installed")
    if implementation == "flex_attention" and "sinks" in name and not torch.cuda.is_available():
        pytest.skip("flex attention has no sinks on a CPU")
    try:
        model = build(name, implementation, **settings)
    except ValueError as refused:  # transformers' own word on which kernels a family has
        if "does not support" not in str(refused):
            raise
        pytest.skip(f"{name}: no {implementation} in transformers")
    return model


def inputs_of(name: str, padding: str, length: int = 12) -> tuple[dict[str, Tensor], Tensor]:
    """Return (inputs of three rows, each row's pooled position): real tokens numbered from 0 whatever the padding."""
    inputs, last = tiny_models.batch(padding, length=length)
    inputs = tiny_models.positions(inputs)
    if name.startswith("bloom"):
        del inputs["position_ids"]
    if name == "roberta":  # its positions begin after the pad id
        inputs["position_ids"] = (inputs["position_ids"] + 1) * inputs["attention_mask"]
    first = inputs["attention_mask"].argmax(dim=1)
    return inputs, first if name in ENCODERS else last


@torch.no_grad()
def tap(model: nn.Module, inputs: dict[str, Tensor], layers: Layers = "last") -> AttentionTap:
    """Return the tap after one forward; flex attention runs uncompiled (compiling takes half a minute a shape)."""
    with torch.compiler.set_stance("force_eager"), attention_row(model, layers) as seen:
        model(**inputs)
    return seen


@torch.no_grad()
def eager(name: str, inputs: dict[str, Tensor], **settings: object) -> Tensor:
    """Return the eager copy's matrices of all layers, (L,B,H,T,T)."""
    return torch.stack(build(name, "eager", **settings)(**inputs, output_attentions=True).attentions)
