"""Text-only training of checkpoints with a vision part: only the language model changes, and all of it is saved."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_runs
import torch
import transformers

from apportion.config.sections import LoraConfig
from apportion.errors import ModelError
from apportion.models.families import refuse_left_out
from apportion.models.loading import load_causal
from apportion.models.lora import target_names
from apportion.models.pretrained import load_settings
from apportion.stages.rl.train import train

WIDE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT = WIDE | {"num_key_value_heads": 2, "vocab_size": 400, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
TOWER = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 32}
ROPE = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0}
LINEAR = {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
LINEAR |= {"linear_conv_kernel_dim": 4, "head_dim": 16, "layer_types": ["linear_attention", "full_attention"]}
QWEN = {"image_token_id": 390, "video_token_id": 391, "vision_start_token_id": 392, "vision_end_token_id": 393}
CLIP = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
CLIP |= {"image_size": 28, "patch_size": 14}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2_5_vl": (
        "Qwen2_5_VLConfig",
        {"text_config": TEXT | {"rope_parameters": ROPE}, "vision_config": TOWER | {"fullatt_block_indexes": [0]}}
        | QWEN,
    ),
    "qwen3_5": ("Qwen3_5Config", {"text_config": TEXT | LINEAR, "vision_config": TOWER} | QWEN),
    "gemma3": (
        "Gemma3Config",
        {
            "text_config": TEXT | {"head_dim": 8, "sliding_window": 4, "layer_types": ["sliding_attention"] * 2},
            "vision_config": CLIP,
            "mm_tokens_per_image": 4,
            "image_token_index": 390,
        },
    ),
    "llava": (
        "LlavaConfig",
        {
            "text_config": TEXT | {"model_type": "llama"},
            "vision_config": CLIP | {"model_type": "clip_vision_model", "projection_dim": 32},
            "image_token_index": 390,
        },
    ),
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_runs.world(tmp_path_factory.mktemp("world"))


def saved(name: str, folder: Path) -> Any:
    """Write a random checkpoint with a vision part, tokenizer and processor to `folder`; return the model."""
    kind, settings = KINDS[name]
    torch.manual_seed(0)
    config = getattr(transformers, kind)(**settings, tie_word_embeddings=False)
    model = transformers.AutoModelForImageTextToText.from_config(config).eval()
    model.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text('{"size": 28}')
    return model


@pytest.mark.parametrize(("name", "rank"), [("qwen2_5_vl", 2), ("qwen2_5_vl", 0), ("qwen3_5", 2), ("llava", 0)])
def test_only_the_language_model_learns_and_all_is_saved(world: Path, tmp_path: Path, name: str, rank: int) -> None:
    before = saved(name, tmp_path / "policy")
    chosen = {"policy": tmp_path / "policy", "lora.rank": rank, "lora.targets": "all", "steps": 1, "compare": "[]"}
    train(tiny_runs.config(world, tmp_path / "run", **chosen))
    final = tmp_path / "run" / "final"
    architecture = json.loads((final / "config.json").read_text())["architectures"][0]
    after = getattr(transformers, architecture).from_pretrained(final).eval()
    assert type(after) is type(before) and (final / "preprocessor_config.json").read_text() == '{"size": 28}'
    old, new = before.state_dict(), after.state_dict()
    assert old.keys() == new.keys()
    changed = {key for key in old if not torch.equal(old[key], new[key])}
    assert changed and all("language_model" in key or key == "lm_head.weight" for key in changed), changed
    gap = tiny_runs.read_lines(tmp_path / "run" / "metrics.jsonl")[-1]["sampling/logprob_gap"]
    assert gap < 1e-4


@pytest.mark.parametrize("name", KINDS)
def test_log_probabilities_are_the_models_own(world: Path, tmp_path: Path, name: str) -> None:
    """With padding on both sides, with a cache, and with the model's own positions on each text alone."""
    own = saved(name, tmp_path / "policy")
    policy = tiny_runs.policy(world, stirred=False, policy=tmp_path / "policy")
    batch = tiny_runs.sampled(policy, tiny_runs.prompts(5), max_new_tokens=6, samples_per_prompt=2)
    torch.testing.assert_close(batch.logprobs, policy.forward(batch, values=False).logprobs, rtol=0, atol=1e-4)
    with torch.no_grad():
        for row in range(0, 10, 3):
            prompt, ids = tiny_runs.alone(batch, row)
            logits = policy.allowed(own(input_ids=torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1])
            alone = logits.log_softmax(dim=-1)[torch.arange(len(ids)), ids]
            torch.testing.assert_close(batch.logprobs[row], alone, rtol=0, atol=1e-4)


@pytest.mark.parametrize("targets", ["all", "attention", "[q_proj, v_proj]"])
def test_adapters_are_in_the_language_model_only(tmp_path: Path, targets: str) -> None:
    saved("qwen2_5_vl", tmp_path / "policy")
    model = load_causal("policy", str(tmp_path / "policy"), torch.float32, torch.device("cpu"))
    chosen: Any = ["q_proj", "v_proj"] if targets.startswith("[") else targets
    names = target_names(model, LoraConfig(targets=chosen).targets)
    assert names and all("language_model.layers" in name for name in names)


def test_weights_that_no_layer_takes_are_not_lost_in_silence(tmp_path: Path) -> None:
    saved("qwen3_5", tmp_path / "policy")
    settings = load_settings("policy", str(tmp_path / "policy"))
    with pytest.raises(ModelError, match=r"2 belong to no layer.*audio\.a.*would lose them"):
        refuse_left_out("policy", "folder", settings, {"unexpected_keys": ["audio.a", "audio.b"]})
