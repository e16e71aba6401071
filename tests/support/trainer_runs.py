"""Tiny runs of sft and dpo: a model with a chat template, demonstrations and pairs on disk, flags of a run."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import tiny
from transformers import AutoModelForCausalLM

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
GOOD, BAD = ("great", "warm", "fine"), ("boring", "dull", "stupid")
SETTINGS: dict[str, Any] = {
    "batch_size": 8,
    "micro_batch": 4,
    "max_length": 64,
    "held_out": 0,
    "lora.rank": 4,
    "optim.lr": 0.01,
    "optim.warmup": 0,
    "dtype": "float32",
    "device": "cpu",
}


def user(text: str) -> dict[str, str]:
    """Return a turn of the user."""
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    """Return a turn of the assistant."""
    return {"role": "assistant", "content": text}


def save_model(folder: Path, template: str | None = TEMPLATE) -> Path:
    """Write a random policy whose tokenizer has a chat template."""
    AutoModelForCausalLM.from_config(tiny.config(0)).save_pretrained(folder)
    tokens = tiny.tokenizer()
    tokens.chat_template = template
    tokens.save_pretrained(folder)
    return folder


def write(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    """Write JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def demonstrations(count: int = 30) -> list[dict[str, Any]]:
    """Return prompts with completions in text."""
    return [{"prompt": f"Film {i} was", "completion": f" a {GOOD[i % 3]} story."} for i in range(count)]


def pairs(count: int = 30) -> list[dict[str, Any]]:
    """Return pairs of texts."""
    rows = demonstrations(count)
    return [
        {"prompt": row["prompt"], "chosen": row["completion"], "rejected": f" a {BAD[i % 3]} and slow story."}
        for i, row in enumerate(rows)
    ]


def chats(count: int = 30) -> list[dict[str, Any]]:
    """Return prompts and completions as messages."""
    return [
        {"prompt": [user(row["prompt"])], "completion": [assistant(row["completion"])]} for row in demonstrations(count)
    ]


def chat_pairs(count: int = 30) -> list[dict[str, Any]]:
    """Return pairs of whole conversations."""
    return [
        {
            "chosen": [user(row["prompt"]), assistant(row["chosen"])],
            "rejected": [user(row["prompt"]), assistant(row["rejected"])],
        }
        for row in pairs(count)
    ]


def world(folder: Path) -> Path:
    """Write the model and a file of each kind of row to `folder`; return it."""
    save_model(folder / "base")
    for name, rows in {
        "demonstrations": demonstrations(),
        "pairs": pairs(),
        "chats": chats(),
        "chat_pairs": chat_pairs(),
    }.items():
        write(folder / f"{name}.jsonl", rows)
    return folder


def flags(folder: Path, data: Path | str, output: Path | str, **changes: Any) -> list[str]:
    """Return the flags of a small run in `folder` (a `world`); `changes` go by dotted names."""
    chosen = {"model": folder / "base", "data": data, "output": output} | SETTINGS | changes
    return [str(word) for name, value in chosen.items() for word in (f"--{name}", value)]
