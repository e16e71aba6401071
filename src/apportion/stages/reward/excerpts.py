"""Excerpts of labelled texts: random windows of tokens, so that a reward model learns to judge short text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor


class Excerpt(NamedTuple):
    """Token ids and the label of the text they were cut from."""

    ids: list[int]
    label: int


class ExcerptPair(NamedTuple):
    """The starts of the two texts of a preference pair, equally long behind what they have in common."""

    chosen: Excerpt
    rejected: Excerpt

    @property
    def ids(self) -> list[int]:
        """The ids of the longer one."""
        return max(self.chosen.ids, self.rejected.ids, key=len)


E = TypeVar("E", bound=Excerpt | ExcerptPair)


def flat(excerpts: Sequence[Excerpt | ExcerptPair]) -> list[Excerpt]:
    """Return single excerpts as they are; of pairs, all chosen ones, then all rejected ones."""
    pairs = [one for one in excerpts if isinstance(one, ExcerptPair)]
    singles = [one for one in excerpts if isinstance(one, Excerpt)]
    return [*singles, *(pair.chosen for pair in pairs), *(pair.rejected for pair in pairs)]


def random_excerpts(
    rows: Sequence[Sequence[int]],
    labels: Sequence[int],
    prompts: Sequence[int],
    count: int,
    tokens: Sequence[int],
    seed: int,
) -> list[Excerpt]:
    """Return `count` excerpts, going round the texts in a seeded order.

    An excerpt's length is drawn evenly from [low, high] tokens. Every second one starts where its text starts (as a
    response to a prompt does), the others anywhere. Of a text whose first `prompts` tokens are its prompt, every
    excerpt is the whole prompt and the start of what follows, which alone has the drawn length: a part from its middle
    would be no response to the prompt.
    """
    generator = torch.Generator().manual_seed(seed)
    low, high = tokens
    order: list[int] = []
    while len(order) < count:
        order += torch.randperm(len(rows), generator=generator).tolist()
    lengths = torch.randint(low, high + 1, (count,), generator=generator).tolist()
    places = torch.rand(count, generator=generator).tolist()
    excerpts = []
    for number, (text, length, place) in enumerate(zip(order[:count], lengths, places, strict=True)):
        ids, prompt = rows[text], prompts[text]
        start = 0 if number % 2 == 0 or prompt else int(place * max(1, len(ids) - length + 1))
        excerpts.append(Excerpt(list(ids[start : start + prompt + length]), labels[text]))
    return excerpts


def random_pairs(
    rows: Sequence[Sequence[int]], prompts: Sequence[int], count: int, tokens: Sequence[int], seed: int
) -> list[ExcerptPair]:
    """Return `count` pairs of excerpts, going round the pairs in a seeded order.

    Args:
        rows: ids of the chosen and the rejected text in turn. prompts: how many ids the two have in common.
        tokens: [low, high], from which the length behind these is drawn evenly.
    """
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    while len(order) < count:
        order += torch.randperm(len(rows) // 2, generator=generator).tolist()
    lengths = torch.randint(tokens[0], tokens[1] + 1, (count,), generator=generator).tolist()
    return [cut_pair(rows, prompts, 2 * i, length) for i, length in zip(order[:count], lengths, strict=True)]


def cut_pair(rows: Sequence[Sequence[int]], prompts: Sequence[int], first: int, length: int) -> ExcerptPair:
    """Return rows `first` and `first` + 1 cut `length` ids behind what they have in common."""
    chosen, rejected = (list(rows[i][: prompts[i] + length]) for i in (first, first + 1))
    return ExcerptPair(Excerpt(chosen, 1), Excerpt(rejected, 0))


def shuffled_batches(excerpts: Sequence[E], size: int, seed: int, pool: int = 16) -> list[list[E]]:
    """Return the excerpts in shuffled batches of like lengths: sorted inside pools of `pool` batches, to pad little."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(excerpts), generator=generator).tolist()
    grouped: list[list[E]] = []
    for first in range(0, len(order), size * pool):
        chosen = sorted((excerpts[i] for i in order[first : first + size * pool]), key=lambda c: len(c.ids))
        grouped += [chosen[i : i + size] for i in range(0, len(chosen), size)]
    return [grouped[i] for i in torch.randperm(len(grouped), generator=generator).tolist()]


def right_pad(excerpts: Sequence[Excerpt], pad: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return (ids (B,K) int64, mask (B,K) bool, labels (B,) int64), padded on the right."""
    width = max(len(c.ids) for c in excerpts)
    ids = torch.tensor([c.ids + [pad] * (width - len(c.ids)) for c in excerpts], dtype=torch.int64)
    lengths = torch.tensor([len(c.ids) for c in excerpts])
    return ids, torch.arange(width)[None, :] < lengths[:, None], torch.tensor([c.label for c in excerpts])
