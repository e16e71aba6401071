"""Excerpts of labelled texts: random windows of tokens, so that a reward model learns to judge short text."""

from __future__ import annotations

import math
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


class RankedExcerpts(NamedTuple):
    """The completions of one prompt and their rankings.

    Attributes:
        completions: K excerpts, each the prompt and a completion; they have no label, 0.
        lengths: of each completion, tokens behind the prompt.
        ranks: of each ranking, K numbers: the lowest is best, NaN is "cannot judge".
        margins: of each ranking, K values.
        prompt: what names the prompt (`data.rankings.Ranking.key`).
    """

    completions: list[Excerpt]
    lengths: list[int]
    ranks: list[tuple[float, ...]]
    margins: list[tuple[float, ...]]
    prompt: str

    @property
    def ids(self) -> list[int]:
        """The ids of the longest completion."""
        return max((one.ids for one in self.completions), key=len)

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """(winner, loser), rows of `completions`, of every pair of different ranks in any of the rankings."""
        rows = range(len(self.completions))
        return [(a, b) for ranks in self.ranks for a in rows for b in rows if ranks[a] < ranks[b]]  # NaN is below none

    def has_pair(self, ties: str) -> bool:
        """Whether any of the rankings says anything, a tie included under "half"."""
        judged = ([rank for rank in ranks if not math.isnan(rank)] for ranks in self.ranks)
        return any(len(ranks) > 1 and (ties == "half" or len(set(ranks)) > 1) for ranks in judged)


POOL = 16  # batches inside which excerpts are sorted by length
E = TypeVar("E", bound=Excerpt | ExcerptPair | RankedExcerpts)


def flat(excerpts: Sequence[Excerpt | ExcerptPair | RankedExcerpts]) -> list[Excerpt]:
    """Return single excerpts as they are; of pairs, all chosen ones, then all rejected ones; of rankings, each once."""
    if excerpts and isinstance(excerpts[0], RankedExcerpts):
        return [one for unit in excerpts if isinstance(unit, RankedExcerpts) for one in unit.completions]
    pairs = [one for one in excerpts if isinstance(one, ExcerptPair)]
    singles = [one for one in excerpts if isinstance(one, Excerpt)]
    return [*singles, *(pair.chosen for pair in pairs), *(pair.rejected for pair in pairs)]


class TokenRows(NamedTuple):
    """Labelled texts, or the texts of pairs in turn, as ids.

    Attributes:
        ids: of each text, without special tokens that the tokenizer adds.
        labels: of each text.
        prompts: how many ids at the start of each text are its prompt; of a pair, all that its texts have in common.
        around: the special tokens that the tokenizer puts before and behind each text, none where it was rendered.
        paired: whether the texts are pairs, chosen and rejected.
    """

    ids: list[list[int]]
    labels: list[int]
    prompts: list[int]
    around: list[tuple[list[int], list[int]]]
    paired: bool

    def cut(self, row: int, length: int, start: int = 0) -> Excerpt:
        """Return the prompt of a row and `length` ids behind it, from `start` on, between the special tokens."""
        before, behind = self.around[row]
        ids = self.ids[row][start : start + self.prompts[row] + length]
        return Excerpt([*before, *ids, *behind], self.labels[row])

    def cut_pair(self, pair: int, length: int) -> ExcerptPair:
        """Return both texts of a pair, cut `length` ids behind what they have in common."""
        return ExcerptPair(self.cut(2 * pair, length), self.cut(2 * pair + 1, length))


def random_cuts(rows: TokenRows, count: int, tokens: Sequence[int], seed: int) -> list[Excerpt] | list[ExcerptPair]:
    """Return `count` random excerpts of `rows`, or pairs of them where the rows are pairs."""
    return random_pairs(rows, count, tokens, seed) if rows.paired else random_excerpts(rows, count, tokens, seed)


def random_excerpts(rows: TokenRows, count: int, tokens: Sequence[int], seed: int) -> list[Excerpt]:
    """Return `count` excerpts, going round the texts in a seeded order.

    An excerpt's length is drawn evenly from [low, high] tokens. Every second one starts where its text starts (as a
    response to a prompt does), the others anywhere. Of a text with a prompt, every excerpt is the whole prompt and the
    start of what follows, which alone has the drawn length: a part from its middle would be no response to the prompt.
    """
    generator = torch.Generator().manual_seed(seed)
    low, high = tokens
    order: list[int] = []
    while len(order) < count:
        order += torch.randperm(len(rows.ids), generator=generator).tolist()
    lengths = torch.randint(low, high + 1, (count,), generator=generator).tolist()
    places = torch.rand(count, generator=generator).tolist()
    excerpts = []
    for number, (text, length, place) in enumerate(zip(order[:count], lengths, places, strict=True)):
        whole = number % 2 == 0 or rows.prompts[text] > 0
        start = 0 if whole else int(place * max(1, len(rows.ids[text]) - length + 1))
        excerpts.append(rows.cut(text, length, start))
    return excerpts


def random_pairs(rows: TokenRows, count: int, tokens: Sequence[int], seed: int) -> list[ExcerptPair]:
    """Return `count` pairs of excerpts, going round the pairs in a seeded order.

    The two of a pair are equally long behind what they have in common, a length drawn evenly from [low, high] tokens.
    """
    generator = torch.Generator().manual_seed(seed)
    low, high = tokens
    order: list[int] = []
    while len(order) < count:
        order += torch.randperm(len(rows.ids) // 2, generator=generator).tolist()
    lengths = torch.randint(low, high + 1, (count,), generator=generator).tolist()
    return [rows.cut_pair(pair, length) for pair, length in zip(order[:count], lengths, strict=True)]


def first_tokens(rows: TokenRows, count: int, length: int) -> list[Excerpt] | list[ExcerptPair]:
    """Return the start of each of the first `count` texts, `length` tokens behind its prompt, or of so many pairs."""
    if rows.paired:
        return [rows.cut_pair(pair, length) for pair in range(min(count, len(rows.ids) // 2))]
    return [rows.cut(row, length) for row in range(min(count, len(rows.ids)))]


def shuffled_batches(excerpts: Sequence[E], size: int, seed: int) -> list[list[E]]:
    """Return the excerpts in shuffled batches of like lengths: sorted inside pools of `POOL` batches, to pad little."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(excerpts), generator=generator).tolist()
    grouped: list[list[E]] = []
    for first in range(0, len(order), size * POOL):
        chosen = sorted((excerpts[i] for i in order[first : first + size * POOL]), key=lambda c: len(c.ids))
        grouped += [chosen[i : i + size] for i in range(0, len(chosen), size)]
    return [grouped[i] for i in torch.randperm(len(grouped), generator=generator).tolist()]


def right_pad(excerpts: Sequence[Excerpt], pad: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return (ids (B,K) int64, mask (B,K) bool, labels (B,) int64), padded on the right."""
    width = max(len(c.ids) for c in excerpts)
    ids = torch.tensor([c.ids + [pad] * (width - len(c.ids)) for c in excerpts], dtype=torch.int64)
    lengths = torch.tensor([len(c.ids) for c in excerpts])
    return ids, torch.arange(width)[None, :] < lengths[:, None], torch.tensor([c.label for c in excerpts])
