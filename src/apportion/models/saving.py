"""Saving of trained models in Hugging Face format, adapters merged in float32, with a model card."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from apportion.models.families import has_other_parts
from apportion.models.files import stored_file
from apportion.models.loading import HUB_ID, load_causal, load_classifier
from apportion.models.lora import merged_copy
from apportion.models.master_weights import to_float32
from apportion.models.policy import Policy
from apportion.models.pretrained import base_of
from apportion.models.tokenizers import needed_rows
from apportion.system import safe_yaml

# what a processor of images or sound is read from, beside the tokenizer
PROCESSOR_FILES = (
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "chat_template.json",
)
CARD = """
# {title}

{text}

Trained by apportion with these settings:

```yaml
{settings}```
"""
BUILTIN_BASES = {"smollm2": "HuggingFaceTB/SmolLM2-135M-Instruct"}  # built-in model -> what the hub has of it


def save_policy(policy: Policy, base: str, folder: Path, settings: Mapping[str, Any]) -> None:
    """Write the policy (float32, adapters merged into a freshly loaded base) to `folder` atomically.

    Its weights must be gathered (`distributed.sharding.Sharded.make_whole`). Weights that were trained in 16 bit become
    their float32 masters.
    """
    if policy.reference is not None:
        to_float32(policy.remainders)
    text = "A policy trained by reinforcement learning against a reward model, its score apportioned over the tokens."
    card = model_card("Policy", "reinforcement-learning", text, settings)
    save_causal(policy.model, policy.tokenizer, base, folder, card, lora=policy.reference is None)


def save_causal(trained: Any, tokenizer: Any, base: str, folder: Path, card: str, *, lora: bool) -> None:
    """Write a trained language model (float32, adapters merged into a freshly loaded `base`) to `folder` atomically."""
    model = trained
    if lora:
        rows = needed_rows(tokenizer, tokenizer.pad_token)
        fresh = load_causal("policy", base, torch.float32, torch.device("cpu"), rows=rows)
        model = merged_copy(trained, fresh)
    set_padding(model, tokenizer.pad_token_id)
    save_model(model, tokenizer, folder, card, processor_files(base) if has_other_parts(model.config) else ())


def set_padding(model: Any, pad: int | None) -> None:
    """Write the pad token into the settings of `model`, and into its generation settings where they have none."""
    for config in {id(one): one for one in (model.config, model.config.get_text_config())}.values():
        config.pad_token_id = pad
    generation = getattr(model, "generation_config", None)
    if generation is not None and generation.pad_token_id is None:
        generation.pad_token_id = pad


def processor_files(base: str) -> list[Path]:
    """Return the files of `base` (a folder or hub id) with which images and sound are read, where it has them."""
    found = (stored_file(base_of(base), name) for name in PROCESSOR_FILES)
    return [path for path in found if path is not None]


def save_classifier(
    adapted: Any, tokenizer: Any, base: str, folder: Path, card: str, *, lora: bool, labels: int = 2
) -> None:
    """Write a trained sequence classifier of 1 or 2 `labels` (float32, adapters merged) to `folder` atomically."""
    model = adapted
    if lora:
        fresh: Any = load_classifier("model", base, torch.float32, torch.device("cpu"), new_head=labels)
        fresh.config.update(head_config(tokenizer, labels))
        model = merged_copy(adapted, fresh)
    save_model(model, tokenizer, folder, card)


def head_config(tokenizer: Any, labels: int = 2) -> dict[str, Any]:
    """Return the 1 or 2 labels and the padding of a reward model's configuration."""
    names = {0: "negative", 1: "positive"} if labels == 2 else {0: "reward"}
    return {
        "pad_token_id": tokenizer.pad_token_id,
        "id2label": names,
        "label2id": {label: i for i, label in names.items()},
    }


def save_model(model: Any, tokenizer: Any, folder: Path, card: str, others: Iterable[Path] = ()) -> None:
    """Write weights (safetensors), tokenizer, README.md and copies of `others` to a temporary folder and rename it to
    `folder`."""
    part = unfinished(folder)
    shutil.rmtree(part, ignore_errors=True)
    model.save_pretrained(part)
    tokenizer.save_pretrained(part)
    for path in others:
        shutil.copyfile(path, part / path.name)
    (part / "README.md").write_text(card, encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(part, folder)


def unfinished(folder: Path) -> Path:
    """Return the temporary name of `folder` while `save_model` writes it; a failed write may leave it."""
    return folder.with_name(f".{folder.name}.tmp")


def model_card(title: str, tag: str, text: str, settings: Mapping[str, Any]) -> str:
    """Return a short model card, with every setting."""
    base = settings.get("policy") or settings.get("model") or ""
    dumped = yaml.safe_dump(dict(settings), sort_keys=False, allow_unicode=True)
    return front_matter(base, tag) + CARD.format(title=title, text=text, settings=dumped)


def front_matter(
    base: str, tag: str, *, task: str | None = None, datasets: Sequence[str] = (), licence: str | None = None
) -> str:
    """Return the front matter of a model card: YAML between dashes, of values that the hub accepts.

    Args:
        base: the model that training started from; a folder is left out, or stands for the base that its card names.
    """
    found = {
        "library_name": "transformers",
        "pipeline_tag": task,
        "tags": ["apportion", "rlhf", tag],
        "base_model": hub_base(base),
        "datasets": list(datasets) or None,
        "license": licence,
    }
    given = {name: value for name, value in found.items() if value is not None}
    return f"---\n{yaml.safe_dump(given, sort_keys=False, allow_unicode=True)}---\n"


def hub_base(base: str) -> str | None:
    """Return the hub id of a base model, or None where it is a folder whose card names none."""
    if not base:
        return None
    if base in BUILTIN_BASES:
        return BUILTIN_BASES[base]
    card = Path(base).expanduser() / "README.md"
    if not card.parent.is_dir():
        return base if HUB_ID.fullmatch(base) else None
    try:
        stored = safe_yaml.load(card.read_text(encoding="utf-8").split("---\n")[1])
        named = stored["base_model"]
    except (OSError, ValueError, LookupError, TypeError, yaml.YAMLError):
        return None
    return named if isinstance(named, str) and HUB_ID.fullmatch(named) else None
