"""Inputs that both sides share: prompts of an exact length and a reward model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from apportion.data.convert import no_progress_bars
from apportion.errors import DataError
from apportion.models.loading import load_classifier
from apportion.models.tokenizers import load_tokenizer


def write_prompts(source: str, tokenizer: Any, length: int, count: int, target: Path) -> Path:
    """Write `count` different prompts of exactly `length` tokens to `target` as JSON lines, and return it.

    A prompt is the text of a row's first `length` tokens, used only if it is tokenised to the same ids, so that a side
    that takes text and one that takes ids process the same tokens.

    Raises:
        DataError: there are fewer such prompts than `count`.
    """
    from apportion.data import prompts

    texts = prompts(source, "rl" if source == "imdb" else None)
    chosen = exact([text for text in texts if isinstance(text, str)], tokenizer, length, count)
    if len(chosen) < count:
        got = f"{source} with {len(chosen)} different prompts of exactly {length} tokens"
        fix = "Give more texts, or lower batches, batch or prompt_tokens."
        raise DataError("prompts", got, f"{count} of them, enough for every batch", fix)
    target.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in chosen), encoding="utf-8")
    return target


def exact(texts: Sequence[str], tokenizer: Any, length: int, count: int) -> list[str]:
    """Return up to `count` different prefixes of `texts` of exactly `length` tokens, none of them special."""
    special = set(tokenizer.all_special_ids)
    prefixes: dict[str, None] = {}
    for text in texts:
        # a token is never longer than 50 characters of ordinary text
        ids = list(tokenizer(text[: 50 * length])["input_ids"])[:length]
        cut = tokenizer.decode(ids)
        if len(ids) == length and not special & set(ids) and list(tokenizer(cut)["input_ids"]) == ids:
            prefixes.setdefault(cut)
        if len(prefixes) == count:
            break
    return list(prefixes)


def save_reward(folder: str, target: Path, pad_token: str | None, seed: int) -> Path:
    """Write a reward model of one label to `target` and return it: the base in `folder` with a seeded random head.

    Its scores mean nothing; a batch costs the same with it as with a trained one.
    """
    tokenizer = load_tokenizer("model", folder, pad_token)
    torch.manual_seed(seed)
    model: Any = load_classifier("model", folder, torch.float32, torch.device("cpu"), new_head=1)
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    with no_progress_bars():
        model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    return target
