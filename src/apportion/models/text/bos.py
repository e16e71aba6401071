"""BOS of texts that were rendered beforehand: written once where the tokenizer writes it by itself."""

from __future__ import annotations

from typing import Any


def added_bos(tokenizer: Any) -> str:
    """Return the BOS token that `tokenizer` puts in front of every text; "" where it has none or adds none."""
    bos = tokenizer.bos_token
    return str(bos) if bos and list(tokenizer("a")["input_ids"][:1]) == [tokenizer.bos_token_id] else ""


def starts_with_bos(tokenizer: Any, text: str) -> bool:
    """Whether `text` begins with the token that `tokenizer` would put in front of it as well."""
    bos = added_bos(tokenizer)
    return bool(bos) and text.startswith(bos)


def without_bos(tokenizer: Any, text: str) -> str:
    """Return `text` without the BOS at its start that `tokenizer` writes by itself; any other text as it is."""
    return text.removeprefix(added_bos(tokenizer))


def special_around(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Return the ids that `tokenizer` puts before and behind a text, such as BOS, or CLS and SEP."""
    marked = list(tokenizer("a")["input_ids"])
    plain = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    places = range(len(marked) - len(plain) + 1)
    at = next((i for i in places if marked[i : i + len(plain)] == plain), None)
    return ([], []) if at is None else (marked[:at], marked[at + len(plain) :])
