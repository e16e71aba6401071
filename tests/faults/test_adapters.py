"""Adapters that do not fit their base model, or cannot be merged: refused, never left out without a word."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_runs
import torch
from malformed_models import edited
from peft import LoraConfig, PrefixTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from apportion.config import RewardConfig
from apportion.errors import ModelError
from apportion.models.adapters import adapter_rows
from apportion.models.files import ADAPTER
from apportion.models.loading import load_causal, load_classifier
from apportion.models.tokenizers import read_tokenizer
from apportion.stages.doctor.reward import check_reward
from apportion.stages.rl.train import train

CPU = torch.device("cpu")
IDS = torch.tensor([[50, 60, 70, 80]])
KINDS = {
    "policy": (AutoModelForCausalLM, load_causal),
    "reward": (AutoModelForSequenceClassification, load_classifier),
}


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory, world: Path) -> Path:
    """Return a folder with a stirred adapter of each kind and `logits.pt` beside its weights."""
    folder = tmp_path_factory.mktemp("adapters")
    for kind, (auto, _) in KINDS.items():
        task = {"task_type": "CAUSAL_LM"} if kind == "policy" else {"modules_to_save": ["score"]}
        adapted = get_peft_model(
            auto.from_pretrained(world / kind), LoraConfig(r=2, target_modules=["q_proj", "v_proj"], **task)
        ).eval()
        with torch.no_grad():
            for parameter in (p for p in adapted.parameters() if p.requires_grad):
                parameter += 0.1 * torch.randn_like(parameter)
            logits = adapted(IDS).logits
        adapted.save_pretrained(folder / kind)
        torch.save(logits, folder / kind / "logits.pt")
    return folder


def load(kind: str, folder: Path) -> Any:
    return KINDS[kind][1](kind, str(folder), torch.float32, CPU)


def changed(adapters: Path, kind: str, folder: Path, change: Any) -> Path:
    """Copy an adapter to `folder` with its weights' names as `change` gives them; None leaves one out."""
    shutil.copytree(adapters / kind, folder)
    weights = {new: v for k, v in load_file(folder / ADAPTER).items() if (new := change(k)) is not None}
    save_file(weights, folder / ADAPTER)
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_that_fits_is_applied(adapters: Path, world: Path, kind: str) -> None:
    expected = torch.load(adapters / kind / "logits.pt", weights_only=True)
    with torch.no_grad():
        found, base = load(kind, adapters / kind)(IDS).logits, load(kind, world / kind)(IDS).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert (found - base).abs().max() > 1e-3


CHANGES = {
    "one level more": lambda k: k.replace("layers", "language_model.layers"),
    "one level less": lambda k: k.replace("model.model.layers", "model.layers"),
    "no prefix": lambda k: k.removeprefix("base_model.model."),
    "one weight lacking": lambda k: None if "layers.1.self_attn.v_proj.lora_B" in k else k,
    "no weight at all": lambda k: None if "lora" in k else k,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CHANGES)
def test_weights_that_fit_no_layer_are_refused(adapters: Path, tmp_path: Path, kind: str, name: str) -> None:
    folder = changed(adapters, kind, tmp_path / "adapter", CHANGES[name])
    with pytest.raises(
        ModelError, match=r"adapter.*(lora_[AB]|score\.weight).*expected an adapter that fits its base model"
    ):
        load(kind, folder)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_of_layers_that_the_settings_do_not_name_are_refused(adapters: Path, tmp_path: Path, kind: str) -> None:
    folder = shutil.copytree(adapters / kind, tmp_path / "adapter")
    edited(folder / "adapter_config.json", target_modules=["q_proj"])
    with pytest.raises(ModelError, match=r"differ in \d+ weights: .*v_proj\.lora_A"):
        load(kind, folder)


def test_a_head_that_the_adapter_should_bring_is_missed(adapters: Path, tmp_path: Path) -> None:
    folder = changed(adapters, "reward", tmp_path / "adapter", lambda k: None if "score" in k else k)
    with pytest.raises(ModelError, match=r"score.*expected an adapter that fits its base model"):
        load("reward", folder)


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_that_cannot_be_merged_is_refused(world: Path, tmp_path: Path, kind: str) -> None:
    task = {"policy": "CAUSAL_LM", "reward": "SEQ_CLS"}[kind]
    prefix = PrefixTuningConfig(task_type=task, num_virtual_tokens=3)
    get_peft_model(KINDS[kind][0].from_pretrained(world / kind), prefix).save_pretrained(tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["peft_type"] == "PREFIX_TUNING"
    with pytest.raises(ModelError, match="expected an adapter that can be merged, such as LoRA"):
        load(kind, tmp_path / "adapter")


def test_a_base_that_lacks_weights_is_refused_under_an_adapter(adapters: Path, world: Path, tmp_path: Path) -> None:
    base = shutil.copytree(world / "policy", tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    folder = shutil.copytree(adapters / "policy", tmp_path / "adapter")
    edited(folder / "adapter_config.json", base_model_name_or_path=str(base))
    with pytest.raises(ModelError, match=r"without \['model\.norm\.weight'\]"):
        load("policy", folder)


def test_no_class_that_an_adapter_names_is_made(adapters: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(adapters / "policy", tmp_path / "adapter")
    named = {"base_model_class": "AutoTokenizer", "parent_library": "transformers"}
    edited(folder / "adapter_config.json", task_type=None, auto_mapping=named)
    assert type(load("policy", folder)).__name__ == "LlamaForCausalLM"


def test_a_new_head_takes_the_place_of_any_and_nothing_else_may_lack(
    adapters: Path, world: Path, tmp_path: Path
) -> None:
    """A reward model is trained on a language model, its adapter, or a classifier of other labels."""
    tiny.save_reward(tmp_path / "three", labels=3)
    for folder, under in ((adapters / "policy", "policy"), (tmp_path / "three", ""), (adapters / "reward", "reward")):
        found: Any = load_classifier("model", str(folder), torch.float32, CPU, new_head=2)
        assert found.score.weight.shape == (2, 32)
        states = found.base_model(IDS).last_hidden_state
        expected = load(under, folder) if under else AutoModelForSequenceClassification.from_pretrained(folder)
        torch.testing.assert_close(states, expected.base_model(IDS).last_hidden_state, rtol=0, atol=1e-5)
    weights = load_file(world / "policy" / "model.safetensors")
    shutil.copytree(world / "policy", tmp_path / "renamed")
    renamed = {f"module.{key}": weight for key, weight in weights.items()}
    save_file(renamed, tmp_path / "renamed" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"renamed without \['model\.embed_tokens\.weight'"):
        load_classifier("model", str(tmp_path / "renamed"), torch.float32, CPU, new_head=2)


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_without_a_tokenizer_has_that_of_its_base(adapters: Path, world: Path, kind: str) -> None:
    """peft stores none."""
    assert not list((adapters / kind).glob("*token*"))
    found, base = (read_tokenizer(kind, str(folder / kind)) for folder in (adapters, world))
    assert found.get_vocab() == base.get_vocab() and found.eos_token_id == base.eos_token_id


@pytest.mark.parametrize("base", ["/no/such/model", "../runs/base", "owner/name/checkpoint"])
def test_a_base_that_is_gone_is_named(adapters: Path, tmp_path: Path, base: str) -> None:
    folder = shutil.copytree(adapters / "policy", tmp_path / "adapter")
    edited(folder / "adapter_config.json", base_model_name_or_path=base)
    with pytest.raises(ModelError, match=rf"adapter, whose base model {base} is not there") as error:
        load("policy", folder)
    assert "base_model_name_or_path" in error.value.fix


def test_embeddings_of_a_new_size_that_are_trained_are_read_although_peft_stores_them_thrice(
    world: Path, tmp_path: Path
) -> None:
    """As a chat format is set up: tokens are added, and embeddings and output layer are modules to save."""
    tokenizer = tiny.tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|user|>", "<|end|>"]})
    model = AutoModelForCausalLM.from_pretrained(world / "policy")
    rows = model.get_input_embeddings().num_embeddings
    model.resize_token_embeddings(rows + 2)
    whole = {"modules_to_save": ["embed_tokens", "lm_head"], "task_type": "CAUSAL_LM"}
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], **whole)).eval()
    with torch.no_grad():
        for parameter in (p for p in adapted.parameters() if p.requires_grad):
            parameter += 0.1 * torch.randn_like(parameter)
    folder = tmp_path / "adapter"
    adapted.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    assert any("modules_to_save.weight" in key for key in load_file(folder / ADAPTER)), "peft no longer does so"
    new = torch.tensor([[50, rows, 70, rows + 1]])
    with torch.no_grad():
        torch.testing.assert_close(load("policy", folder)(new).logits, adapted(new).logits, rtol=0, atol=1e-5)
        states = load_classifier("model", str(folder), torch.float32, CPU, new_head=2).base_model(new).last_hidden_state
        expected = adapted.base_model.model.model(new).last_hidden_state  # a reward model is trained on it: no lm_head
        torch.testing.assert_close(states, expected, rtol=0, atol=1e-5)
    assert adapter_rows(str(folder)) == rows + 2
    (tmp_path / "p.jsonl").write_text('{"prompt": "<|user|>a film<|end|>"}\n' * 2)
    changes = {"policy": folder, "prompts": tmp_path / "p.jsonl", "steps": 1, "sampling.prompt_tokens": "null"}
    train(tiny_runs.config(world, tmp_path / "run", **changes))


@pytest.mark.parametrize("kind", KINDS)
def test_added_tokens_come_with_their_embeddings(world: Path, tmp_path: Path, kind: str) -> None:
    model = KINDS[kind][0].from_pretrained(world / kind)
    rows = model.get_input_embeddings().num_embeddings + 2
    model.resize_token_embeddings(rows)
    task = {"task_type": "CAUSAL_LM"} if kind == "policy" else {"modules_to_save": ["score"]}
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], **task)).eval()
    adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    new = torch.tensor([[50, rows - 1, 70]])
    with torch.no_grad():
        torch.testing.assert_close(load(kind, tmp_path / "adapter")(new).logits, adapted(new).logits)


def test_the_doctor_counts_the_embeddings_that_an_adapter_stores(world: Path, tmp_path: Path) -> None:
    """Its base's settings still name fewer ids than the texts have."""
    tokenizer = tiny.tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|user|>", "<|end|>"]})
    model = AutoModelForCausalLM.from_pretrained(world / "policy")
    rows = model.get_input_embeddings().num_embeddings
    model.resize_token_embeddings(rows + 2)
    whole = {"modules_to_save": ["embed_tokens", "lm_head"], "task_type": "CAUSAL_LM"}
    folder = tmp_path / "adapter"
    get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], **whole)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    texts = [{"text": f"<|user|>{text} {i}<|end|>", "label": i % 2} for i, text in enumerate(tiny.TEXTS * 9)]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))
    config = RewardConfig(model=str(folder), data=str(tmp_path / "t.jsonl"), test_texts=20, device="cpu")
    found = {finding.name: finding for finding in check_reward(config)}
    assert found["vocabulary"].level == "ok", (found["vocabulary"], found["labels"])
