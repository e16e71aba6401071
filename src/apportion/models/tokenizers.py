"""Tokenizers: reading, padding, the ids that end a response, and the ids that are never sampled."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from apportion.errors import ModelError
from apportion.models.files import is_adapter
from apportion.models.pretrained import FIX, NO_CODE, base_of, generation_stops, with_reason

TOKENIZER_FILES = ("*token*", "vocab*", "*.model")


def load_tokenizer(field: str, folder: str, pad_token: str | None = None) -> Any:
    """Return the tokenizer in `folder` (or hub id) with its padding, as `with_pad` sets it for a policy.

    Raises:
        ModelError: there is none.
    """
    return with_pad(field, read_tokenizer(field, folder), pad_token, add=True)


def read_tokenizer(field: str, folder: str) -> Any:
    """Return the tokenizer in `folder` (or hub id) as stored, or that of the base model of an adapter without one.

    Raises:
        ModelError: there is none.
    """
    from transformers import AutoTokenizer

    try:
        own = not is_adapter(folder) or any(next(Path(folder).glob(name), None) for name in TOKENIZER_FILES)
        tokenizer = AutoTokenizer.from_pretrained(folder if own else base_of(folder), **NO_CODE)
        _check_templates(tokenizer.chat_template)
        return tokenizer
    except Exception as error:  # the tokenizers library raises plain Exceptions
        raise ModelError(field, with_reason(folder, error), "a folder or hub id with a tokenizer", FIX) from error


def _check_templates(templates: Any) -> None:
    """Raise ValueError for named chat templates that could not be saved as a file of that name."""
    names = templates if isinstance(templates, dict) else {}
    invalid = next((str(name) for name in names if not re.fullmatch(r"[\w.-]+", str(name)) or ".." in str(name)), None)
    if invalid is not None:
        raise ValueError(f"a chat template named {invalid[:60]!r}")


def with_pad(field: str, tokenizer: Any, pad_token: str | None, *, add: bool = False) -> Any:
    """Return `tokenizer` with `pad_token`, or its own, as pad token; without either, EOS.

    Masks tell padding from text, so the pad token may also end texts. A tokenizer without EOS and without a pad token
    stays without one (`pad_id`).

    Args:
        pad_token: a token of the vocabulary; with `add`, a new one is added to it as a special token. The model then
            needs an embedding for it (`models.loading.load_causal`).

    Raises:
        ModelError: `pad_token` is not in the vocabulary, and `add` is False.
    """
    if pad_token is not None and pad_token not in tokenizer.get_vocab():
        if not add or not pad_token.strip():
            ends = (tokenizer.eos_token, tokenizer.bos_token)
            reserved = [str(t) for t in tokenizer.added_tokens_decoder.values() if str(t) not in ends][:8]
            fix = f"Choose a reserved token that never occurs in text, such as one of {reserved}."
            raise ModelError("pad_token", pad_token, f"a token of the vocabulary of the {field}'s tokenizer", fix)
        tokenizer.add_special_tokens({"pad_token": pad_token})
    elif pad_token is not None:
        tokenizer.pad_token = pad_token
    elif tokenizer.pad_token_id is None and tokenizer.eos_token_id is not None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def pad_id(tokenizer: Any) -> int:
    """Return the id that fills masked places: of the pad token, else of EOS, else 0. Models never attend to it."""
    known = (i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None)
    return int(next(known, 0))


def unnamed_ids(tokenizer: Any, width: int) -> list[int]:
    """Return the ids below `width`, the number of a model's logits, that stand for no token, in order.

    Output layers are rounded up to round sizes, and vocabularies have holes.
    """
    named = {*tokenizer.get_vocab().values(), *tokenizer.added_tokens_decoder}
    return [i for i in range(width) if i not in named]


def end_ids(tokenizer: Any, listed: Iterable[int] = ()) -> tuple[int, ...]:
    """Return the ids that end a response: EOS, then those of `listed` that are tokens.

    Args:
        listed: the ids at which the model's generation settings stop (`models.pretrained.generation_stops`).
    """
    eos = tokenizer.eos_token_id
    more = sorted(set(listed) - {eos})
    if more:
        named = {*tokenizer.get_vocab().values(), *tokenizer.added_tokens_decoder}
        more = [i for i in more if i in named]
    return (*(() if eos is None else (eos,)), *more)


def policy_ends(folder: str, tokenizer: Any, stop: str) -> tuple[int, ...]:
    """Return the ids that end a response of the policy in `folder`: EOS, and all at which its settings stop.

    Raises:
        ModelError: settings that cannot be read, or no such id, and responses have to end.
    """
    ends = end_ids(tokenizer, generation_stops(folder))
    check_ends(ends, stop)
    return ends


def check_ends(ends: Sequence[int], stop: str) -> None:
    """Raise ModelError where responses end at EOS and there is none."""
    if not ends and stop == "eos":
        fix = "Set eos_token in its tokenizer_config.json, or use --sampling.stop length."
        raise ModelError("policy's tokenizer", "no EOS token", "one, as sampling.stop is eos", fix)


def needed_rows(tokenizer: Any, pad_token: str | None) -> int:
    """Return the least number of embeddings: one for a pad token that a setting may have added to the vocabulary."""
    return 0 if pad_token is None else pad_id(tokenizer) + 1


def banned_ids(tokenizer: Any, stop: str, ends: Sequence[int] | None = None, width: int = 0) -> list[int]:
    """Return the ids that are never sampled: the pad token, ids without a token, and ends of fixed-length responses.

    A pad token that is one of the ends is sampled where responses end.

    Args:
        ends: the ids that end a response; by default the tokenizer's EOS.
        width: number of the model's logits; 0 leaves ids without a token out.

    Raises:
        ModelError: responses end at EOS and there is none.
    """
    ends = end_ids(tokenizer) if ends is None else ends
    check_ends(ends, stop)
    pad = [] if tokenizer.pad_token_id is None else [tokenizer.pad_token_id]
    banned = [i for i in pad if i not in ends] + (list(ends) if stop == "length" else [])
    return banned + [i for i in (unnamed_ids(tokenizer, width) if width else []) if i not in banned]
