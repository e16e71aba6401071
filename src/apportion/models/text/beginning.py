"""The beginning of tokenised texts: one BOS, never two."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from apportion.errors import DataError


def has_doubled_bos(tokenizer: Any, ids: Sequence[int]) -> bool:
    """Whether `ids` begin with BOS twice: the text begins with it, and the tokenizer adds one."""
    bos = tokenizer.bos_token_id
    return bos is not None and list(ids[:2]) == [bos, bos]


def check_doubled_bos(field: str, tokenizer: Any, ids: Sequence[int], where: str = "") -> None:
    """Raise DataError where the tokenised text `ids` begins with BOS twice; `where` is its file and line."""
    if has_doubled_bos(tokenizer, ids):
        got = f"{where}{': ' * bool(where)}BOS {tokenizer.bos_token!r} ({tokenizer.bos_token_id}) twice"
        raise DataError(field, got, "one BOS at the beginning of a text", REMOVE_BOS)


REMOVE_BOS = "Remove it from the texts or from the chat template: the tokenizer adds one already."
