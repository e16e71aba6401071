"""Models that cannot be used, each with the defect that its folder's name states."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import tiny
import torch
from malformed_models import edited
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, BertConfig, ByT5Tokenizer


def save_broken(folder: Path) -> Path:
    """Write every one of them to a folder of its own in `folder`, which is returned."""
    (folder / "empty").mkdir()
    (tiny.save_policy(folder / "no-config") / "config.json").unlink()
    (tiny.save_policy(folder / "no-weights") / "model.safetensors").unlink()
    pickled = tiny.save_policy(folder / "pickled")
    torch.save(load_file(pickled / "model.safetensors"), pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    weights = tiny.save_reward(folder / "truncated") / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    (tiny.save_policy(folder / "no-json") / "config.json").write_text("{")
    settings = tiny.save_policy(folder / "no-such-type") / "config.json"
    settings.write_text(settings.read_text().replace('"llama"', '"llamma"'))
    for file in tiny.save_policy(folder / "no-tokenizer").glob("tokenizer*"):
        file.unlink()
    tiny.tokenizer(pad=None).save_pretrained(tiny.save_policy(folder / "no-pad"))
    for name, save in (("pad-is-eos", tiny.save_policy), ("reward-pad-is-eos", tiny.save_reward)):
        tiny.tokenizer(pad="<eos>").save_pretrained(save(folder / name))
    without_end = tiny.tokenizer()
    without_end.eos_token = None
    without_end.save_pretrained(tiny.save_policy(folder / "no-eos"))
    for file in ("config.json", "generation_config.json"):
        edited(folder / "no-eos" / file, eos_token_id=None)
    quantised = {"quant_method": "gptq", "bits": 4}
    edited(tiny.save_policy(folder / "quantised") / "config.json", quantization_config=quantised)
    edited(tiny.save_policy(folder / "recurrent") / "config.json", model_type="recurrent_gemma")
    more_words = tiny.tokenizer()
    more_words.add_tokens(["film"])
    more_words.save_pretrained(tiny.save_reward(folder / "other-vocabulary"))
    tiny.save_reward(folder / "three-labels", labels=3)
    changed(tiny.save_policy(folder / "missing-layer"), lambda w: w.pop("model.layers.1.mlp.up_proj.weight"))
    changed(tiny.save_policy(folder / "nan-policy"), lambda w: w["model.norm.weight"].fill_(torch.nan))
    changed(tiny.save_reward(folder / "nan-head"), lambda w: w["score.weight"].fill_(torch.nan))
    changed(tiny.save_reward(folder / "inf-head", labels=1), lambda w: w["score.weight"][0, 0].fill_(torch.inf))
    (tiny.save_reward(folder / "damaged-statistics") / "reward.json").write_text("{}")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    sizes |= {"id2label": {0: "negative", 1: "positive"}}
    encoder = BertConfig(vocab_size=400, pad_token_id=0, **sizes)
    short = BertConfig(vocab_size=400, pad_token_id=0, max_position_embeddings=6, **sizes)
    for name, settings in (("encoder", encoder), ("short-encoder", short)):
        AutoModelForSequenceClassification.from_config(settings).save_pretrained(folder / name)
        tiny.tokenizer().save_pretrained(folder / name)
    ByT5Tokenizer().save_pretrained(tiny.save_reward(folder / "slow-tokenizer"))
    return folder


def changed(model: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Apply `change` to the stored weights of `model`."""
    weights = load_file(model / "model.safetensors")
    change(weights)
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
