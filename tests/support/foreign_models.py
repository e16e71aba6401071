"""Reward models that share no tokenizer with the tiny policy, rollouts of given texts, and a run with them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import tiny
import tiny_runs
import tiny_tokenizers
import torch
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    LlamaConfig,
)

from apportion.cli.main import main
from apportion.models.reward import RewardModel, load_reward
from apportion.models.text.token_spans import PolicyText
from apportion.types import Rollouts

BOTH = frozenset({"scores", "reward_attention"})
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
SAID = [
    ("I rented this", " film, and it was a great story 😀!"),
    ("A lovely", " Ｐicture wi\u0301th music\n\nﬁne"),
    ("Boring", " שלום 👩🏽\u200d👩\u200d👧 end"),
    ("No", "!"),
]
CHATML = (
    "{% for m in messages %}<eos>{{ m.role }}\n{{ m.content | trim }}\n{% endfor %}"
    "{% if add_generation_prompt %}<eos>assistant\n{% endif %}"
)
BRACKETS = (
    "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }} #{% endif %}{% endfor %}"
)


CHAT = [{"role": "user", "content": "Say: RESPONSE0RESPONSE"}]


def save_model(folder: Path, tokenizer: Any, config: Any, seed: int = 3) -> Path:
    """Write a random classifier, its attention far from flat, with `tokenizer`."""
    torch.manual_seed(seed)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def decoder(**more: Any) -> LlamaConfig:
    wide = SIZES | {"num_key_value_heads": 2, "vocab_size": 400, "max_position_embeddings": 512, "num_labels": 1}
    return LlamaConfig(**wide | {"pad_token_id": 0, "bos_token_id": None, "initializer_range": 0.3} | more)


def encoder(kind: Any = BertConfig, **more: Any) -> Any:
    return kind(**SIZES | {"vocab_size": 210, "pad_token_id": 0, "initializer_range": 0.4, "num_labels": 2} | more)


def world(folder: Path) -> Path:
    """Write a tiny world, and reward models with other tokenizers, to `folder`; return it."""
    tiny_runs.world(folder)
    save_model(folder / "encoder", tiny_tokenizers.wordpiece(), encoder())
    save_model(folder / "other", tiny_tokenizers.byte_fallback(), decoder())
    save_model(folder / "trimming", tiny_tokenizers.trimming(), decoder(), seed=4)
    chatty = tiny_tokenizers.byte_fallback()
    chatty.chat_template = BRACKETS
    begin = TemplateProcessing(single="<eos> $A", special_tokens=[("<eos>", 1)])
    chatty.backend_tokenizer.post_processor = begin  # plain text has a token before it, a template writes its own
    save_model(folder / "chat", chatty, decoder(), seed=5)
    return folder


@cache
def policy_text() -> PolicyText:
    return PolicyText(tiny.tokenizer())


def judge(folder: Path, name: str, **more: Any) -> RewardModel:
    return load_reward(str(folder / name), device="cpu", policy=replace(policy_text(), **more))


def batch_of(message: Sequence[tuple[str, str]], *, eos: bool = True, extra: int = 0) -> Rollouts:
    """Return rollouts of the policy's ids of (prompt, response), with an EOS at the end."""
    tokenizer = policy_text().tokenizer
    prompts, responses = ([tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
                          for texts in zip(*message, strict=True))  # fmt: skip
    return tiny_runs.rollouts_of(prompts, [r + [tiny_runs.EOS] * eos for r in responses], extra=extra)


def logged(folder: Path, output: Path, **changes: Any) -> list[dict[str, Any]]:
    """Run `apportion rl` for two steps and return its logged rollouts."""
    assert main(["rl", *tiny_runs.flags(folder, output, **{"policy": folder / "ending", **changes})]) == 0
    return tiny_runs.read_lines(output / "rollouts.jsonl")
