"""Inputs of the killed runs: small models with a real tokenizer, prompts, and the flags."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

SENTENCES = (
    "I rented this film because everyone called it wonderful, and it was: a great story, well told and well played.",
    "This film was a terrible waste of time; the story was bad, the acting worse, and I wanted my money back.",
    "A lovely little picture with a warm heart, good music and a fine cast. I would gladly see it again.",
    "Boring from beginning to end. The jokes are dull, the plot is stupid, and nobody in it can act at all.",
)
ADAPTIVE = "[attention: {mix: 0.7}, kl_penalty: {coef: 0.1, target: 0.5, horizon: 20}]"
SMALL: Mapping[str, Any] = {
    "credit": ADAPTIVE,
    "sampling.batch_size": 4,
    "sampling.max_new_tokens": 8,
    "ppo.epochs": 2,
    "ppo.mini_batch": 2,
    "optim.lr": 0.003,
    "log_rollouts": 2,
    "dtype": "float32",
    "device": "cpu",
    "threads": 1,
}
KINDS: Mapping[str, Mapping[str, Any]] = {
    "adapters": {"lora.rank": 4},
    "all weights": {"lora.rank": 0},
    "smollm2": {"lora.rank": 4, "policy": "smollm2", "steps": 9, "checkpoint_every": 2, "sampling.max_new_tokens": 4},
}


def make_world(folder: Path, tokenizer: str) -> Path:
    """Write a random 2-layer Llama policy, a reward model and prompts to `folder`; return it.

    Args:
        tokenizer: a built-in model's name, or a folder; both models get a copy of it.
    """
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig

    from apportion.models.loading import locate
    from apportion.models.tokenizers import load_tokenizer

    vocabulary = load_tokenizer(
        "tokenizer", str(Path(tokenizer)) if Path(tokenizer).is_dir() else locate("", tokenizer)
    )
    kinds: list[tuple[str, Any, dict[str, Any]]] = [
        ("policy", AutoModelForCausalLM, {}),
        ("reward", AutoModelForSequenceClassification, {"num_labels": 2}),
    ]
    for seed, (name, auto, more) in enumerate(kinds):
        torch.manual_seed(seed)
        config = LlamaConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=len(vocabulary),
            max_position_embeddings=256,
            pad_token_id=vocabulary.pad_token_id,
            eos_token_id=vocabulary.eos_token_id,
            bos_token_id=vocabulary.bos_token_id,
            initializer_range=0.2,
            tie_word_embeddings=True,
            **more,
        )
        auto.from_config(config).save_pretrained(folder / name)
        vocabulary.save_pretrained(folder / name)
    rows = [{"prompt": SENTENCES[i % 4][: 20 + i]} for i in range(24)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


def arguments_of(world: Path, output: Path, kind: str, **more: Any) -> list[str]:
    """Return the command line of a run of `kind` into `output`; the kind's own settings override `more`."""
    paths = {"policy": world / "policy", "reward_model": world / "reward", "prompts": world / "prompts.jsonl"}
    settings = {**SMALL, **paths, **more, **KINDS[kind], "output": output}
    return ["rl", *(str(word) for name, value in settings.items() for word in (f"--{name}", value))]
