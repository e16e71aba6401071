"""Tiny configurations of every text family of transformers: one shrinking of sizes, and a table of exceptions."""

from __future__ import annotations

import dataclasses
from typing import Any

VOCABULARY, WIDTH, HEADS, KEYS, HEAD, LAYERS, CONTEXT = 400, 32, 4, 2, 8, 2, 128
PAD, EOS, BOS = 0, 1, 2

# sizes by the names that transformers gives them; a name that a family does not have is left out
SIZES: dict[str, Any] = {}


def _sizes(value: Any, *names: str) -> None:
    SIZES.update(dict.fromkeys(names, value))


_sizes(VOCABULARY, "vocab_size", "vocab_size_per_layer_input", "decoder_vocab_size", "unpadded_vocab_size")
_sizes(
    WIDTH, "hidden_size", "d_model", "n_embd", "dim", "emb_dim", "embedding_size", "embedding_dim",
    "hidden_size_global", "adapter_in_dim", "adapter_out_dim", "adapter_input_size",
    "word_embed_proj_dim", "pooler_hidden_size", "attention_hidden_size", "backbone_hidden_size", "lru_width",
    "cross_attention_hidden_size", "prediction_head_size", "out_hidden_size", "router_hidden_size", "d_latents",
    "input_embedding_size", "output_embedding_size", "true_hidden_size", "ple_embed_dim",
)  # fmt: skip
_sizes(
    64, "intermediate_size", "ffn_dim", "d_ff", "dff", "dim_ff", "d_inner", "hidden_dim", "decoder_ffn_dim",
    "encoder_ffn_dim", "ffn_hidden_size", "expert_ffn_hidden_size", "feed_forward_size", "intermediate_size_mlp",
    "dense_intermediate_size", "mlp_dim", "mamba_d_ssm",
)  # fmt: skip
_sizes(
    16, "moe_intermediate_size", "shared_expert_intermediate_size", "shared_experts_intermediate_size",
    "shared_intermediate_size", "moe_shared_expert_intermediate_size", "entity_emb_size", "xpath_unit_hidden_size",
    "intra_bottleneck_size", "prompt_mid_dim", "pronunciation_embed_dim", "shape_embed_dim",
)  # fmt: skip
_sizes(
    HEADS, "num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads", "encoder_attention_heads",
    "decoder_attention_heads", "num_encoder_attention_heads", "num_decoder_attention_heads", "linear_num_value_heads",
    "linear_num_heads", "index_n_heads", "swa_num_attention_heads", "num_self_attention_heads",
    "num_cross_attention_heads", "mamba_n_heads", "mamba_num_heads",
)  # fmt: skip
_sizes(
    KEYS, "num_key_value_heads", "num_kv_heads", "swa_num_key_value_heads", "linear_num_key_heads", "num_query_groups"
)
_sizes(
    HEAD, "head_dim", "d_kv", "d_head", "dim_head", "kv_channels", "attention_head_size", "v_head_dim", "swa_head_dim",
    "qk_rope_head_dim", "qk_nope_head_dim", "linear_key_head_dim", "linear_value_head_dim", "linear_head_dim",
    "kv_lora_rank", "q_lora_rank", "o_lora_rank", "index_head_dim", "hidden_size_per_layer_input", "laurel_rank",
    "rotary_dim", "d_rel", "adapter_rank", "gated_norm_rank", "hc_lowrank",
)  # fmt: skip
_sizes(
    LAYERS, "num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers", "depth",
    "num_decoder_layers", "num_encoder_layers", "num_blocks", "num_layers_per_stack",
)  # fmt: skip
_sizes(4, "num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts", "zero_expert_num", "num_codebooks")
_sizes(2, "num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk", "n_group", "num_expert_group")
_sizes(1, "topk_group", "n_shared_experts", "mamba_n_groups", "n_groups")
_sizes(8, "state_size", "mamba_d_state", "ssm_state_size", "mamba_chunk_size", "chunk_size")
_sizes(4, "mamba_dt_rank", "time_step_rank")
# sparse attention chooses among equal scores as it likes: here, as in real texts that are shorter, it keeps all
_sizes(CONTEXT, "index_topk")
_sizes(3, "conv_kernel_size")
_sizes(16, "mamba_d_head", "mamba_head_dim", "mamba_headdim", "patch_size", "image_size")
_sizes(4, "sliding_window", "window_size", "local_attention", "sliding_window_size", "attention_chunk_size")
_sizes(
    CONTEXT, "max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_sequence_length", "context_length",
    "original_max_position_embeddings", "max_source_positions", "max_target_positions", "model_max_length",
)  # fmt: skip
_sizes(20, "entity_vocab_size", "shape_vocab_size", "pronunciation_vocab_size", "num_hash_buckets", "audio_vocab_size")
TOKENS = {"pad_token_id": PAD, "eos_token_id": EOS, "bos_token_id": BOS}
# lists of kinds of layers: each kind is kept once
LAYER_LISTS = ("layer_types", "mlp_layer_types", "layers_block_type", "attn_layers", "indexer_types")
# what the shrinking does not guess: settings of a family that replace those above
EXCEPTIONS: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "blt": {"encoder_hash_byte_group_vocab": 20},
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}}
    },
    "dbrx": {"attn_config": {"kv_n_heads": KEYS, "clip_qkv": 8, "rope_theta": 1e4}},
    "deepseek_v2": {"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "n_group": 1},
    "dots3_note_text": {
        "swa_num_attention_heads": HEADS, "swa_num_key_value_heads": HEADS, "swa_q_lora_rank": HEAD,
        "swa_kv_lora_rank": HEAD, "swa_head_dim": 2 * HEAD, "swa_qk_nope_head_dim": HEAD, "swa_v_head_dim": HEAD,
    },
    "emu3": {"vocabulary_map": {"<image>": 390, "<|extra_200|>": 391}},
    "emu3_vqgan": {"base_channels": 32, "channel_multiplier": [1, 1], "codebook_size": 8, "num_res_blocks": 1},
    "esm": {"vocab_size": VOCABULARY},
    "esmc": {"num_key_value_heads": HEADS},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "hrm_text": {"num_layers_per_stack": None},
    "hunyuan_v1_dense": {"head_dim": HEAD},
    "hunyuan_v1_moe": {"head_dim": HEAD},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "kolibri1": {"num_experts": 4},
    "layoutlmv3": {"coordinate_size": 4, "shape_size": 8},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "lilt": {"hidden_size": 48},
    "mamba2": {"num_heads": 8},
    "markuplm": {"max_xpath_tag_unit_embeddings": 20, "max_xpath_subs_unit_embeddings": 20,
                 "tag_pad_id": 19, "subs_pad_id": 19, "max_depth": 3},
    "ministral": {"head_dim": HEAD},
    "nemotron": {"head_dim": HEAD, "num_key_value_heads": KEYS},
    "qwen4_exp_text": {
        "indexer_n_heads": HEADS, "indexer_kv_heads": 1, "indexer_head_dim": HEAD, "indexer_budget": 8,
        "indexer_compress_ratio": 2,
    },
    "reformer": {"axial_pos_embds": False, "attn_layers": ["local", "lsh"], "hash_seed": 0},
    "xlstm": {"hidden_size": 128, "embedding_dim": 128},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "layers_block_type": ["linear_attention", "hybrid", "hybrid"], "num_hidden_layers": 3,
        "attention_hidden_size": 2 * WIDTH,
    },
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip
# families that cannot be made tiny here, by task, and why; a test holds these lists to what fails
NOT_MADE: dict[str, dict[str, str]] = {
    "causal": {
        "gemma3n": "its vision part needs the package timm",
        "gemma4_assistant": "a draft of another model, whose keys and values it reads",
        "gemma4_unified_assistant": "a draft of another model, whose keys and values it reads",
        "musicgen": "it writes codes of sound, and no text",
        "musicgen_melody": "it writes codes of sound, and no text",
    },
    "classifier": {"layoutlmv2": "it needs the package detectron2"},
}


def families(task: str) -> list[str]:
    """Return the names of transformers' families of `task`, "classifier" or "causal", that a class is named for."""
    from transformers.models.auto import modeling_auto as auto

    names = auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if task == "causal" else None
    return sorted(names or auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES)


def tiny_config(name: str, **more: Any) -> Any:
    """Return the tiny configuration of the family `name`; those of `more` that it has go to it last."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = CONFIG_MAPPING[name]
    known = {field.name for field in dataclasses.fields(kind)}
    more = {key: value for key, value in more.items() if key in known or key == "num_labels"}
    made = _shrunk(kind, EXCEPTIONS.get(name, {})) | more
    return kind(**made | ({"decoder_start_token_id": PAD} if made.get("is_encoder_decoder", _two_parts(kind)) else {}))


def _two_parts(kind: Any) -> bool:
    return bool(getattr(kind(), "is_encoder_decoder", False))


def _shrunk(kind: Any, exceptions: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a configuration class with every known size made small."""
    from transformers import PreTrainedConfig

    default = vars(kind())
    fields = {field.name: default.get(field.name, field.default) for field in dataclasses.fields(kind)}
    found: dict[str, Any] = {name: value for name, value in TOKENS.items() if name in fields}
    for name, value in fields.items():
        if isinstance(value, PreTrainedConfig):
            found[name] = type(value)(**_shrunk(type(value), EXCEPTIONS.get(value.model_type, {})))
        elif name in SIZES and isinstance(value, int) and not isinstance(value, bool):
            found[name] = SIZES[name]
        elif name in SIZES and isinstance(value, list | tuple) and value:
            found[name] = [SIZES[name]] * LAYERS
    if "kv_lora_rank" in found:  # latent attention: every head has keys of its own
        found["num_key_value_heads"] = HEADS
    lists = {name: [*dict.fromkeys(fields[name])] for name in LAYER_LISTS if fields.get(name)}
    depth = max([LAYERS, *map(len, lists.values())])
    found |= {name: ([kinds[0]] * (depth - len(kinds))) + kinds for name, kinds in lists.items()}
    found |= {name: depth for name in ("num_hidden_layers", "num_layers") if name in found}
    return found | exceptions
