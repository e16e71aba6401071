"""Folders that hold more, or something other, than one model: an old adapter, quantised weights, tied embeddings."""

from __future__ import annotations

import os
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_runs
import torch
from malformed_models import edited
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, Gemma3nConfig

from apportion.errors import ModelError
from apportion.models import adapters
from apportion.models.files import ADAPTER
from apportion.models.loading import load_causal, load_classifier, locate
from apportion.models.pretrained import QUANTISATION_PACKAGES, fix_of, load_settings, reason
from apportion.stages.rl.train import train

CPU = torch.device("cpu")
IDS = torch.tensor([[50, 60, 399, 80, 2]])


def adapter(folder: Path, base: Path, *, seed: int = 4, auto: Any = AutoModelForCausalLM, **settings: Any) -> Any:
    """Return a peft model with a stirred adapter on `base`, written to `folder`."""
    torch.manual_seed(seed)
    adapted = get_peft_model(auto.from_pretrained(base), LoraConfig(r=4, **settings)).eval()
    with torch.no_grad():
        for parameter in (p for p in adapted.parameters() if p.requires_grad):
            parameter += 0.3 * torch.randn_like(parameter)
    adapted.save_pretrained(folder)
    return adapted


def test_a_folder_of_checkpoints_names_the_newest(world: Path, tmp_path: Path) -> None:
    for number, name in enumerate(("checkpoint-9", "checkpoint-100")):
        shutil.copytree(world / "reward", tmp_path / "out" / name)
        os.utime(tmp_path / "out" / name, (number, number))
    with pytest.raises(ModelError, match="a folder with config.json and weights") as error:
        locate("reward_model", str(tmp_path / "out"))
    assert f"such as {tmp_path / 'out' / 'checkpoint-100'}." in error.value.fix


@pytest.mark.parametrize("base", ["there", "gone", "settings without weights"])
def test_whole_weights_beside_an_old_adapter_are_the_model(world: Path, tmp_path: Path, base: str) -> None:
    folder, merged = tmp_path / "policy", tmp_path / "merged"
    model = adapter(folder, world / "policy", target_modules=["q_proj"], task_type="CAUSAL_LM").merge_and_unload()
    with torch.no_grad():
        model.model.norm.weight.mul_(1.7)
        expected = model(IDS).logits
    model.save_pretrained(merged)
    shutil.copytree(merged, folder, dirs_exist_ok=True)
    tiny.tokenizer().save_pretrained(folder)
    if base == "gone":
        edited(folder / "adapter_config.json", base_model_name_or_path="no-such-base")
    if base == "settings without weights":
        (folder / ADAPTER).unlink()
    with torch.no_grad():
        found: Any = load_causal("policy", str(folder), torch.float32, CPU)
        torch.testing.assert_close(found(IDS).logits, expected, rtol=0, atol=1e-5)
    assert found.name_or_path == str(folder)
    train(tiny_runs.config(world, tmp_path / "run", policy=folder, **{"steps": 1, "optim.lr": 1e-9}))
    with torch.no_grad():
        final = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "final")(IDS).logits
    torch.testing.assert_close(final, expected, rtol=0, atol=1e-4)


def test_a_reward_model_beside_its_old_adapter_is_the_folders(world: Path, tmp_path: Path) -> None:
    folder, settings = tmp_path / "judge", {"target_modules": ["q_proj"], "modules_to_save": ["score"]}
    auto = AutoModelForSequenceClassification
    model = adapter(folder, world / "reward", auto=auto, task_type="SEQ_CLS", **settings).merge_and_unload().eval()
    with torch.no_grad():
        model.model.norm.weight.mul_(1.7)
        expected = model(IDS).logits
        model.save_pretrained(tmp_path / "merged")
        shutil.copytree(tmp_path / "merged", folder, dirs_exist_ok=True)
        found: Any = load_classifier("reward_model", str(folder), torch.float32, CPU)
        torch.testing.assert_close(found(IDS).logits, expected, rtol=0, atol=1e-5)


def test_an_adapter_on_an_adapter_is_refused(world: Path, tmp_path: Path) -> None:
    adapter(tmp_path / "one", world / "policy", target_modules=["q_proj"])
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    edited(tmp_path / "two" / "adapter_config.json", base_model_name_or_path=str(tmp_path / "one"))
    with pytest.raises(ModelError, match="merge that one first|is an adapter itself"):
        load_causal("policy", str(tmp_path / "two"), torch.float32, CPU)


TIED: dict[str, dict[str, Any]] = {
    "the embeddings": {"target_modules": ["embed_tokens"]},
    "the embeddings and attention": {"target_modules": ["embed_tokens", "q_proj"]},
    "the output layer": {"target_modules": ["lm_head"]},
    "both": {"target_modules": ["embed_tokens", "lm_head"]},
    "an output layer of its own": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "embeddings of its own": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "single tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [5, 399]},
}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", TIED)
def test_an_adapter_on_embeddings_is_merged_to_its_own_logits(
    world: Path, tmp_path: Path, name: str, tied: bool
) -> None:
    """And what is saved from it gives the same logits again."""
    base = world / "policy"
    if not tied:
        model = AutoModelForCausalLM.from_pretrained(base)
        adapters.untie(model)
        model.save_pretrained(tmp_path / "base")
        base = tmp_path / "base"
        assert not load_settings("policy", str(base)).tie_word_embeddings
    adapted = adapter(tmp_path / "adapter", base, **TIED[name])
    with torch.no_grad():
        expected = adapted(IDS).logits
    merged: Any = load_causal("policy", str(tmp_path / "adapter"), torch.float32, CPU)
    with torch.no_grad():
        torch.testing.assert_close(merged(IDS).logits, expected, rtol=0, atol=1e-3)
        merged.save_pretrained(tmp_path / "saved")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
        torch.testing.assert_close(again(IDS).logits, expected, rtol=0, atol=1e-3)


def test_a_merge_that_changes_the_logits_is_refused(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a limit below rounding nothing is exact."""
    adapter(tmp_path / "adapter", world / "policy", target_modules=["q_proj", "embed_tokens"])
    monkeypatch.setattr(adapters, "MERGED", -1.0)
    with pytest.raises(ModelError, match=r"logits change by .* expected an adapter that can be merged exactly"):
        load_causal("policy", str(tmp_path / "adapter"), torch.float32, CPU)


@pytest.mark.parametrize("method", [*QUANTISATION_PACKAGES, "exl9"])
def test_quantised_weights_are_refused_by_the_name_of_their_method(tmp_path: Path, method: str) -> None:
    folder = tiny.save_reward(tmp_path / "m")
    edited(folder / "config.json", quantization_config={"quant_method": method, "bits": 4})
    package = QUANTISATION_PACKAGES.get(method, method)
    with pytest.raises(ModelError, match=rf"quantised by {method}.*Use the unquantised model") as error:
        load_classifier("reward_model", str(folder), torch.float32, CPU)
    assert package in str(error.value)
    edited(tiny.save_policy(tmp_path / "p") / "config.json", quantization_config={"quant_method": method})
    with pytest.raises(ModelError, match=f"policy: got .*quantised by {method}"):
        load_causal("policy", str(tmp_path / "p"), torch.float32, CPU)


def test_an_adapter_on_a_quantised_base_names_what_to_change(world: Path, tmp_path: Path) -> None:
    adapter(tmp_path / "adapter", world / "policy", target_modules=["q_proj"])
    base = shutil.copytree(world / "policy", tmp_path / "base")
    edited(base / "config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    edited(tmp_path / "adapter" / "adapter_config.json", base_model_name_or_path=str(base))
    with pytest.raises(ModelError, match=r"quantised by bitsandbytes.*base_model_name_or_path"):
        load_causal("policy", str(tmp_path / "adapter"), torch.float32, CPU)


@pytest.mark.skipif(find_spec("timm") is not None, reason="timm is installed")
def test_a_package_that_is_absent_is_named_with_the_fix(tmp_path: Path) -> None:
    """Gemma 3n's vision part is timm's: an ImportError of transformers, whose message begins with a blank line."""
    text = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 400}
    Gemma3nConfig(text_config=text).save_pretrained(tmp_path)
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"policy: got .*\(.*timm.*\).*[Ii]nstall"):
        load_causal("policy", str(tmp_path), torch.float32, CPU)


def test_the_first_line_with_text_is_the_reason_of_an_error() -> None:
    assert reason(ImportError("\n\n  needs foo\nand more")) == "needs foo" and reason(ValueError("")) == "ValueError"
    assert fix_of(ImportError("needs foo", name="foo")).startswith("`pip install foo`")
    assert "package" in fix_of(ImportError("needs it")) and "package" not in fix_of(OSError("a file"))
