"""Pairs of a positive and a negative review, their first tokens, equally many of each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from apportion.data import Labelled
from apportion.errors import DataError


def make_pairs(
    rows: Sequence[Labelled], tokenizer: Any, count: int, tokens: tuple[int, int], seed: int
) -> list[dict[str, str]]:
    """Return `count` different pairs {chosen, rejected}, no review in two of them.

    The number of tokens of a pair is drawn evenly from `tokens`, lowest and highest, and both texts are tokenised to
    exactly so many, so that length says nothing.

    Raises:
        DataError: there are fewer such pairs.
    """
    generator = torch.Generator().manual_seed(seed)
    kinds = [list(dict.fromkeys(row.text for row in rows if row.label == label)) for label in (1, 0)]
    orders = [[texts[i] for i in torch.randperm(len(texts), generator=generator).tolist()] for texts in kinds]
    lengths = torch.randint(tokens[0], tokens[1] + 1, (min(map(len, orders)),), generator=generator).tolist()
    pairs = dict[tuple[str | None, ...], dict[str, str]]()  # by their texts: two texts may begin alike
    for good, bad, length in zip(*orders, lengths, strict=False):  # the more frequent kind has some left over
        cuts = tuple(beginning(text, tokenizer, length) for text in (good, bad))
        if len(pairs) < count and None not in cuts and cuts[0] != cuts[1]:
            pairs.setdefault(cuts, {"chosen": str(cuts[0]), "rejected": str(cuts[1])})
    if len(pairs) < count:
        got = f"{len(pairs)} pairs of texts of {tokens[0]} to {tokens[1]} tokens"
        raise DataError("--data", got, f"{count} of them", "Give more texts, or ask for fewer pairs or tokens.")
    return list(pairs.values())


def beginning(text: str, tokenizer: Any, length: int) -> str | None:
    """Return the text of the first `length` tokens; None where it is shorter, has special ones, or its text is
    tokenised to other ids."""
    # a token is never longer than 50 characters of ordinary text
    ids = list(tokenizer(text[: 50 * length], add_special_tokens=False)["input_ids"])[:length]
    cut = str(tokenizer.decode(ids))
    same = len(ids) == length and list(tokenizer(cut, add_special_tokens=False)["input_ids"]) == ids
    return cut if same and cut.strip() and not {*tokenizer.all_special_ids} & {*ids} else None
