"""Exports of a database: K-wise rankings, and TRL's pairs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from apportion.data.answers.rankings_to_pairs import ranked_pairs
from apportion.label.store import Store
from apportion.label.store.reading import rankings

SOURCE = "apportion label"


def ranking_rows(store: Store, *, every: bool = False) -> Iterator[dict[str, Any]]:
    """Yield the K-wise rankings of a database, one a person and item.

    Each has prompt, completions, ranks (1 is best, equal numbers are ties, None for "cannot judge"), item, annotator,
    seconds, shown (the completion at each position of the page) and source.

    Args:
        every: also rankings that were replaced or refused, with a column status.
    """
    for one in rankings(store, every=every):
        if one.ranks is None:
            continue
        row = {
            "prompt": one.prompt,
            "completions": one.completions,
            "ranks": one.ranks,
            "item": one.item,
            "annotator": one.annotator,
            "seconds": one.seconds,
            "shown": one.shown,
            "source": SOURCE,
        }
        yield row | ({"status": one.status} if every else {})


def pair_rows(store: Store, *, best_worst: bool = False) -> Iterator[dict[str, Any]]:
    """Yield the pairs of every ranking in TRL's form: prompt, chosen, rejected; then item and annotator.

    Args:
        best_worst: only the best answer against the worst (the first of each, where several are tied).
    """
    for one in rankings(store):
        for winner, loser in ranked_pairs(one.ranks or [], "best_worst" if best_worst else "all"):
            if one.completions[winner] == one.completions[loser]:
                continue  # there is nothing to learn
            texts = {"chosen": one.completions[winner], "rejected": one.completions[loser]}
            yield {"prompt": one.prompt, **_conversational(one.prompt, texts)} | {
                "item": one.item,
                "annotator": one.annotator,
            }


def _conversational(prompt: Any, texts: dict[str, Any]) -> dict[str, Any]:
    """Return the texts as messages where the prompt is a conversation: TRL wants all three of one kind."""
    if isinstance(prompt, str):
        return texts
    return {
        name: [{"role": "assistant", "content": text}] if isinstance(text, str) else text
        for name, text in texts.items()
    }
