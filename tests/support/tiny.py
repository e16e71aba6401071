"""Small real models made on the spot: a byte-level tokenizer, a 2-layer Llama policy and a reward model on it."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    PreTrainedTokenizerFast,
)

TEXTS = [
    "I rented this film because everyone called it wonderful, and it was: a great story, well told and well played.",
    "This film was a terrible waste of time; the story was bad, the acting worse, and I wanted my money back.",
    "A lovely little picture with a warm heart, good music and a fine cast. I would gladly see it again.",
    "Boring from beginning to end. The jokes are dull, the plot is stupid, and nobody in it can act at all.",
]


def tokenizer(*, pad: str | None = "<pad>") -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer trained on four sentences, with EOS `<eos>` and the pad token asked for."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        TEXTS,
        trainers.BpeTrainer(vocab_size=400, special_tokens=["<pad>", "<eos>", "<unk>"], initial_alphabet=alphabet),
    )
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<eos>", unk_token="<unk>", pad_token=pad)


def config(seed: int, **more: object) -> LlamaConfig:
    """Return the settings of a 2-layer Llama with grouped heads whose attention is far from flat."""
    torch.manual_seed(seed)
    return LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=400,
        max_position_embeddings=128,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
        initializer_range=0.2,
        tie_word_embeddings=True,
        **more,
    )


def save_policy(folder: Path, seed: int = 0) -> Path:
    """Write a random policy with its tokenizer to `folder`."""
    AutoModelForCausalLM.from_config(config(seed)).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def save_reward(folder: Path, seed: int = 1, labels: int = 2) -> Path:
    """Write a random reward model with 1 or 2 labels to `folder`; two are named as `apportion reward` names them."""
    names = {"id2label": {0: "negative", 1: "positive"}} if labels == 2 else {"num_labels": labels}
    AutoModelForSequenceClassification.from_config(config(seed, **names)).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def save_prompts(path: Path, count: int = 24) -> Path:
    """Write `count` prompts as JSON lines."""
    import json

    rows = [{"prompt": TEXTS[i % len(TEXTS)][: 12 + i]} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def save_reviews(path: Path, count: int = 60) -> Path:
    """Write `count` labelled reviews as CSV with columns text and label."""
    import csv

    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        for i in range(count):
            writer.writerow([f"{TEXTS[i % 4]} Seen {i} times, in {1950 + i}.", (i + 1) % 2])
    return path
