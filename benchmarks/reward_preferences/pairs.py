"""Preference pairs: read, cut to a budget of tokens, and divided into folds by prompt."""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from apportion.models.loading import locate
from apportion.models.tokenizers import load_tokenizer
from apportion.stages.reward.ranked_evaluation import Pair

TEXTS = ("prompt", "chosen", "rejected")
Row = Mapping[str, Any]  # TEXTS, and "tokens": whole lengths of chosen and rejected


def read_pairs(path: str) -> list[Row]:
    """Return the pairs, whole texts."""
    rows = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]
    return [{name: row[name] for name in TEXTS} for row in rows]


def short_rows(rows: Sequence[Row], options: argparse.Namespace) -> list[Row]:
    """Return the rows with the last tokens of prompts and the first of answers.

    Pairs that the cut made equal answers, or equal to an earlier pair, go: the reader takes no item twice.
    """
    tokenizer = load_tokenizer("--model", locate("--model", options.model))
    first, last = slice(0, options.answer_tokens), slice(-options.prompt_tokens, None)
    parts = {"prompt": last, "chosen": first, "rejected": first}
    short, seen = list[Row](), set[tuple[str, frozenset[str]]]()
    for row in rows:
        ids = {name: tokenizer(row[name], add_special_tokens=False)["input_ids"] for name in parts}
        cut = {name: str(tokenizer.decode(ids[name][part])) for name, part in parts.items()}
        item = (cut["prompt"], frozenset((cut["chosen"], cut["rejected"])))
        if len(item[1]) == 2 and item not in seen:
            seen.add(item)
            short.append(cut | {"tokens": (len(ids["chosen"]), len(ids["rejected"]))})
    return short


def fold_of(prompt: str, folds: int, salt: str = "") -> int:
    """Return the fold of a prompt, by hash."""
    return int.from_bytes(hashlib.sha256((salt + prompt).encode()).digest()[:8], "big") % folds


def split(rows: Sequence[Row], fold: int, folds: int, salt: str = "") -> tuple[list[Row], list[Row]]:
    """Return the pairs of the other folds, and those of `fold`."""
    parts: tuple[list[Row], list[Row]] = ([], [])
    for row in rows:
        parts[fold_of(row["prompt"], folds, salt) == fold].append(row)
    return parts


def at_whole_length(pairs: Sequence[Pair], rows: Sequence[Row]) -> list[Pair]:
    """Return the pairs, one a row in the rows' order, with the lengths of the whole answers."""
    whole = [row["tokens"] for row in rows]
    return [
        pair._replace(longer=chosen - rejected, length=max(chosen, rejected))
        for pair, (chosen, rejected) in zip(pairs, whole, strict=True)
    ]
