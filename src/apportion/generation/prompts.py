"""Prompts of a run: loaded, tokenised, checked against the context, and served in a seeded order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from apportion.config.sections import SamplingConfig
from apportion.data import BadRows
from apportion.errors import ConfigError, DataError


def load_prompts(source: str, part: str, bad: BadRows | None = None) -> list[Any]:
    """Return prompts: texts, or conversations as lists of {role, content}; `part` is for the built-in set only.

    `bad` records invalid rows; None makes the first of them an error.
    """
    from apportion.data import prompts

    return list(prompts(source, part if source == "imdb" else None, bad=bad))


def tokenize(
    texts: Sequence[Any], tokenizer: Any, sampling: SamplingConfig, seed: int, context: int
) -> list[list[int]]:
    """Return prompts as ids: the chat template for conversations; truncated to a seeded number of tokens if configured.

    Raises:
        DataError: a prompt is empty, or longer than the limit or the model's context allows; it names the row.
    """
    rows = encoded(texts, tokenizer, sampling, seed)
    limit = min(sampling.max_prompt_tokens, context - sampling.max_new_tokens)
    if limit < 1:
        expected = f"less than the policy's context of {context} tokens"
        raise ConfigError("sampling.max_new_tokens", sampling.max_new_tokens, expected, "Lower it.")
    for number, row in enumerate(rows):
        if not row or len(row) > limit:
            got = f"{len(row)} tokens: {str(texts[number])[:40]}…"
            expected = f"1 to {limit} tokens (max_prompt_tokens {sampling.max_prompt_tokens}, context {context})"
            fix = "Shorten it, or set sampling.prompt_tokens to keep only its beginning."
            raise DataError(f"prompt {number + 1}", got, expected, fix)
    return rows


def encoded(texts: Sequence[Any], tokenizer: Any, sampling: SamplingConfig, seed: int) -> list[list[int]]:
    """Return prompts as `tokenize` does, without a check of their length."""
    rows = [_ids(text, tokenizer, sampling) for text in texts]
    if sampling.prompt_tokens is None:
        return rows
    low, high = sampling.prompt_tokens
    generator = torch.Generator().manual_seed(seed)
    cuts = torch.randint(low, high + 1, (len(rows),), generator=generator).tolist()
    return [row[:cut] for row, cut in zip(rows, cuts, strict=True)]


def conversations(
    texts: Sequence[Any], rows: Sequence[Sequence[int]], sampling: SamplingConfig
) -> dict[tuple[int, ...], list[dict[str, Any]]]:
    """Return the turns of prompts that are conversations, by their ids (`rows` of `tokenize`).

    A conversation that is truncated to its first tokens is treated as text.
    """
    if sampling.prompt_tokens is not None:
        return {}
    return {tuple(row): text for text, row in zip(texts, rows, strict=True) if not isinstance(text, str)}


def _ids(text: Any, tokenizer: Any, sampling: SamplingConfig) -> list[int]:
    if not isinstance(text, str):
        return _conversation(text, tokenizer)
    if sampling.prompt_tokens is not None:  # a token is never longer than 50 characters of ordinary text
        text = text[: 50 * sampling.prompt_tokens[1]]
    return list(tokenizer(text)["input_ids"])


def _conversation(turns: Any, tokenizer: Any) -> list[int]:
    try:
        return list(tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False))
    except Exception as error:  # a template is a program that may raise anything
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        fix = "Give prompts as text, or use a policy whose tokenizer has a chat template for such turns."
        raise DataError(
            "prompts", f"a conversation ({reason})", "one that the policy's chat template renders", fix
        ) from error


class PromptStream:
    """Serves prompts in an order that depends only on the seed and the step, so that a resume needs no state."""

    def __init__(self, texts: Sequence[Any], tokenizer: Any, sampling: SamplingConfig, seed: int, context: int) -> None:
        self.seed = seed
        self.rows = tokenize(texts, tokenizer, sampling, seed, context)
        self.conversations = conversations(texts, self.rows, sampling)

    def take(self, step: int, count: int) -> list[list[int]]:
        """Return the `count` prompts of batch `step` (from 1); each pass over the prompts has a new order."""
        first = (step - 1) * count
        return [self.rows[self._order(i // len(self.rows))[i % len(self.rows)]] for i in range(first, first + count)]

    def _order(self, epoch: int) -> list[int]:
        if getattr(self, "_cached", (None, None))[0] != epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self._cached = (epoch, torch.randperm(len(self.rows), generator=generator).tolist())
        return self._cached[1]
