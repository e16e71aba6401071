"""Models and tokenizers that are damaged or planted, each in the way that its folder's name says; made on the spot."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tiny
import torch
from safetensors.torch import load_file, save_file

PLANTED = "import pathlib\npathlib.Path('planted-code-ran').write_text('')\n"  # what no loading may ever run
WEIGHTS = "model.safetensors"
ADAPTER = "adapter_model.safetensors"


def save_malformed(folder: Path) -> Path:
    """Write every one of them to a folder of its own in `folder`, which is returned."""
    for part in (damaged_weights, damaged_settings, planted_code, damaged_adapters, damaged_tokenizers):
        part(folder)
    return folder


def edited(path: Path, **changes: Any) -> None:
    """Put `changes` into the JSON object in `path`; None takes a key away."""
    found = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in found.items() if value is not None}))


def damaged_weights(folder: Path) -> None:
    """Files of weights that are cut off, garbage, of other shapes, or that point elsewhere."""
    whole = (tiny.save_policy(folder / "cut-weights") / WEIGHTS).read_bytes()
    for name, content in {
        "cut-weights": whole[: len(whole) // 2],
        "cut-header": whole[:20],
        "no-header": b"",
        "endless-header": struct.pack("<Q", 2**62) + whole[8:],
        "garbage-weights": b"\x93NUMPY" * 400,
        "pickle-inside": b"\x80\x04cposix\nsystem\n(S'touch planted-code-ran'\ntR.",
    }.items():
        (tiny.save_policy(folder / name) / WEIGHTS).write_bytes(content)
    other = tiny.save_policy(folder / "other-shapes") / WEIGHTS
    weights = load_file(other)
    weights["model.embed_tokens.weight"] = torch.zeros(7, 32)
    save_file(weights, other, metadata={"format": "pt"})
    for name, text in {
        "index-outside": json.dumps({"metadata": {}, "weight_map": {"model.norm.weight": "../../outside.safetensors"}}),
        "index-garbage": "{",
        "index-list": "[]",
    }.items():
        (tiny.save_policy(folder / name) / WEIGHTS).unlink()
        (folder / name / f"{WEIGHTS}.index.json").write_text(text)


def damaged_settings(folder: Path) -> None:
    """config.json that is no object or says what no model can be, and other settings beside it."""
    for name, text in {
        "config-list": "[]",
        "config-cut": '{"model_type": "lla',
        "config-binary": "\x00\x01\x02",
    }.items():
        (tiny.save_policy(folder / name) / "config.json").write_text(text)
    changes: dict[str, dict[str, Any]] = {
        "no-type": {"model_type": None, "architectures": None},
        "size-is-text": {"hidden_size": "many"},
        "size-is-zero": {"num_attention_heads": 0},
        "size-is-negative": {"num_hidden_layers": -3},
        "size-is-huge": {"hidden_size": 4 * 10**9},
        "heads-do-not-divide": {"num_attention_heads": 5},
        "no-activation": {"hidden_act": "nothing"},
        "image-model": {"model_type": "vit"},
    }
    for name, change in changes.items():
        edited(tiny.save_policy(folder / name) / "config.json", **change)
    (tiny.save_policy(folder / "generation-garbage") / "generation_config.json").write_text("{")
    (tiny.save_reward(folder / "statistics-nan") / "reward.json").write_text('{"mean": NaN, "sd": 1}')


def planted_code(folder: Path) -> None:
    """Models that bring Python of their own, in every place where transformers looks for it."""
    auto = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model", "AutoTokenizer": ["code.T", None]}
    model = tiny.save_policy(folder / "code-in-model")
    edited(model / "config.json", model_type="mine", auto_map=auto)
    known = tiny.save_policy(folder / "code-in-known-model")  # of a type that transformers has: its own class is used
    edited(known / "config.json", auto_map=auto)
    tokenizer = tiny.save_policy(folder / "code-in-tokenizer")
    edited(tokenizer / "tokenizer_config.json", auto_map=auto, tokenizer_class="MyTokenizer")
    for place in (model, known, tokenizer):
        (place / "code.py").write_text(PLANTED)
    only = tiny.save_policy(folder / "pickle-only")
    torch.save(load_file(only / WEIGHTS), only / "pytorch_model.bin")
    (only / WEIGHTS).unlink()


def damaged_adapters(folder: Path) -> None:
    """Adapters without a base, with pickled weights, or with none that fit."""
    settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "target_modules": ["q_proj"]}
    for name, base in {
        "no-base": None,
        "lost-base": "./no-such-model",
        "pickled-base": str(folder / "pickle-only"),
        "pickled-adapter": str(folder / "no-base-model"),
    }.items():
        adapter = folder / name
        tiny.tokenizer().save_pretrained(adapter)
        (adapter / "adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": base}))
        save_file(
            {"x": torch.zeros(1)},
            adapter / ("other.safetensors" if name == "pickled-adapter" else ADAPTER),
        )
    torch.save({"x": torch.zeros(1)}, folder / "pickled-adapter" / "adapter_model.bin")
    renamed = folder / "adapter-renamed"  # sound, but for the names of its layers: peft leaves it out with a warning
    tiny.tokenizer().save_pretrained(renamed)
    base = str(tiny.save_policy(folder / "adapted"))
    (renamed / "adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": base}))
    names = [f"base_model.model.layers.{i}.self_attn.q_proj.lora_{k}.weight" for i in range(2) for k in "AB"]
    save_file({name: torch.ones((2, 32) if "A" in name else (32, 2)) for name in names}, renamed / ADAPTER)
    garbage = folder / "adapter-garbage"
    tiny.tokenizer().save_pretrained(garbage)
    (garbage / "adapter_config.json").write_text("{")
    save_file({"x": torch.zeros(1)}, garbage / ADAPTER)


def damaged_tokenizers(folder: Path) -> None:
    """Tokenizers whose files are damaged, or say what cannot be."""
    for name, text in {
        "tokenizer-garbage": "{",
        "tokenizer-empty": "",
        "tokenizer-object": "{}",
        "tokenizer-list": "[1]",
    }.items():
        (tiny.save_policy(folder / name) / "tokenizer.json").write_text(text)
    (tiny.save_policy(folder / "tokenizer-config-garbage") / "tokenizer_config.json").write_text("{")
    (tiny.save_policy(folder / "tokenizer-config-list") / "tokenizer_config.json").write_text("[]")

    def change(name: str, edit: Callable[[dict[str, Any]], object]) -> None:
        path = tiny.save_policy(folder / name) / "tokenizer.json"
        found = json.loads(path.read_text())
        edit(found)
        path.write_text(json.dumps(found))

    change("tokenizer-no-model", lambda t: t.pop("model"))
    change("tokenizer-other-model", lambda t: t["model"].update(type="Nothing"))
    change("tokenizer-merges", lambda t: t["model"].update(merges=[["zz", "yy"]]))
    change("tokenizer-large-ids", lambda t: t["model"]["vocab"].update({"Ġfilm": 5000}))
    for name, template in {
        "template-syntax": "{% for m in messages %}{{ m.content }",
        "template-reaches-out": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "template-raises": "{{ raise_exception('no system turn') }}",
        "template-endless": "{% for i in range(10**9) %}{{ i }}{% endfor %}",
        "template-outside": [{"name": "default", "template": "x"}, {"name": "../../outside", "template": "x"}],
    }.items():
        path = tiny.save_policy(folder / name) / "tokenizer_config.json"
        edited(path, chat_template=template)
