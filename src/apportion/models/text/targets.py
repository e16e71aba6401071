"""Targets of supervised training: demonstrations and pairs as ids, with the ids that the loss counts.

Conversations are rendered by the model's chat template, as prompts are sampled from; every target ends with an id at
which the model stops.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from apportion.data.answers import Demonstration, Pair
from apportion.data.answers.demonstrations import ASSISTANT
from apportion.data.conversations import Conversation
from apportion.errors import DataError, ModelError
from apportion.models.text.bos import starts_with_bos, without_bos
from apportion.models.text.chat import render_conversation
from apportion.models.text.labelled import shared_length
from apportion.models.text.turn_spans import turn_span

DROP, TRUNCATE = "drop", "truncate"


class Target(NamedTuple):
    """One row to train on.

    Attributes:
        ids: of the whole row. mask: the ids that the loss counts. key: the text before the first of them, or all.
    """

    ids: list[int]
    mask: list[bool]
    key: str

    @property
    def first(self) -> int:
        """The place of the first id that the loss counts."""
        return self.mask.index(True)


class PairTarget(NamedTuple):
    """The ids of a prompt and of its two answers; `key` is the prompt's text."""

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]
    key: str


@dataclass
class Limits:
    """What a row of ids has to keep.

    Attributes:
        length: the most ids of a row. overlong: "drop" leaves a longer one out, "truncate" cuts its end.
        setting: the one that gives the length, for errors. ways: flags that leave a longer row out, for errors.
        embeddings: ids that the model has an embedding for; None: of every one.
    """

    length: int
    overlong: str = DROP
    embeddings: int | None = None
    setting: str = "max_length"
    ways: str = "--overlong drop or --skip_bad_rows"


@dataclass
class Counts:
    """What happened to the rows: those over the limit, cut or left out; ends that were added; BOS written once; equal
    pairs that were left out; turns of the assistant that the loss does not count, since the template writes no end
    behind them or does not show them where they stand."""

    overlong: int = 0
    ends_added: int = 0
    bos_removed: int = 0
    equal: int = 0
    turns_left_out: int = 0


@dataclass
class TargetEncoder:
    """Turns demonstrations and pairs into ids.

    Args:
        setting: the setting that gave the rows, for errors.
        tokenizer: the model's. ends: the ids at which it stops, EOS first.
        completion_only: whether the loss counts only what follows the prompt, and turns of the assistant.
        variables: of the chat template; a row's own win over them.

    Attributes:
        counts: what happened to the rows so far.
    """

    setting: str
    tokenizer: Any
    ends: Sequence[int]
    limits: Limits
    completion_only: bool = True
    variables: Mapping[str, Any] = field(default_factory=dict)
    counts: Counts = field(default_factory=Counts)

    def encode(self, given: Demonstration) -> Target | None:
        """Return the ids of a demonstration; None where it is longer than the limit and left out.

        Raises:
            ModelError: a conversation, and the tokenizer has no chat template.
            DataError: as `render_conversation`; no turn of the assistant that is located with certainty, no room for
                the target, an id without an embedding; with the row.
        """
        made = self._whole(given)
        if not self.completion_only:
            made = made._replace(mask=[True] * len(made.ids))
        if self._fits([made.ids], made.first, given.where):
            return made
        if self.limits.overlong == DROP:
            return None
        return Target(made.ids[: self.limits.length], made.mask[: self.limits.length], made.key)

    def encode_pair(self, pair: Pair) -> PairTarget | None:
        """Return the ids of a pair; None where the answers are equal, or longer than the limit and left out.

        The prompt is what comes before the first id of an answer that differs from the prompt's own ids, the same for
        both. Raises as `encode`.
        """
        chosen, rejected = self._whole(pair.chosen, last_only=True), self._whole(pair.rejected, last_only=True)
        if chosen.ids == rejected.ids:
            self.counts.equal += 1
            return None
        start = min(chosen.first, rejected.first)
        fits = self._fits([chosen.ids, rejected.ids], start, pair.chosen.where)
        if not fits and self.limits.overlong == DROP:
            return None
        prompt, limit = chosen.ids[:start], self.limits.length
        return PairTarget(prompt, chosen.ids[start:limit], rejected.ids[start:limit], chosen.key)

    def _whole(self, given: Demonstration, last_only: bool = False) -> Target:
        """Return the ids of a row without regard to the limit."""
        made = self._text(given) if isinstance(given.content, str) else self._conversation(given, last_only)
        limit = self.limits.embeddings
        if limit is not None and max(made.ids, default=0) >= limit:
            token = max(made.ids)
            got = f"{given.where}: {self.tokenizer.convert_ids_to_tokens(token)!r} ({token})"
            fix = "Use the tokenizer that the model was trained with, or pass --skip_bad_rows."
            raise DataError(self.setting, got, f"ids below the model's {limit} embeddings", fix)
        return made

    def _text(self, given: Demonstration) -> Target:
        """Return a text as the tokenizer encodes it, with EOS behind it."""
        text, size = str(given.content), given.prompt
        if starts_with_bos(self.tokenizer, text):  # the tokenizer writes it by itself
            self.counts.bos_removed += 1
            shorter = without_bos(self.tokenizer, text)
            size, text = max(0, size - (len(text) - len(shorter))), shorter
        ids = list(self.tokenizer(text)["input_ids"])
        start = shared_length(list(self.tokenizer(text[:size])["input_ids"]), ids) if size else 0
        ids = self._ended(ids, start)
        return Target(ids, [i >= start for i in range(len(ids))], text[:size] or text)

    def _conversation(self, given: Demonstration, last_only: bool) -> Target:
        """Return a conversation as the chat template renders it, with the assistant's turns as targets."""
        if not self.tokenizer.chat_template:
            got = f"a tokenizer without a chat template, and conversations in {self.setting}"
            fix = "Use a model with a chat template, or give the texts as prompt and completion."
            raise ModelError("model's tokenizer", got, "a chat template", fix)
        assert isinstance(given.content, Conversation)
        turns = Conversation(given.content, given.content.tools, {**self.variables, **given.content.template_kwargs})
        text, shown, _ = render_conversation(self.setting, self.tokenizer, turns, where=given.where, generation=False)
        ids, last = self._ids(text), len(turns) - 1
        span = turn_span(self.tokenizer, shown, text, last)
        if span is None:
            got = f"{given.where}: turn {last + 1}, the answer, which the chat template changes or moves"
            fix = "Give such rows as prompt and completion in text, or pass --skip_bad_rows."
            raise DataError(self.setting, got, "an answer that the template renders where it stands", fix)
        start = shared_length(self._ids(text[: span[0]]), ids)
        ids = self._ended(ids, start)
        mask = [i >= start for i in range(len(ids))]
        for place in range(given.prompt, last) if not last_only else ():
            if turns[place]["role"] == ASSISTANT:
                self._add_turn(turn_span(self.tokenizer, shown, text, place), text, ids, mask)
        first = mask.index(True)
        return Target(ids, mask, text[: span[0]] if first == start else self.tokenizer.decode(ids[:first]))

    def _add_turn(self, span: tuple[int, int] | None, text: str, ids: list[int], mask: list[bool]) -> None:
        """Mark an earlier turn of the assistant in `mask`, where it is located and ends with an end."""
        if span is not None:
            first, end = (shared_length(self._ids(text[:place]), ids) for place in span)
            if self._ends(ids[first:end]):
                mask[first:end] = [True] * (end - first)
                return
        self.counts.turns_left_out += 1

    def _ids(self, text: str) -> list[int]:
        """Return the ids of a rendered text, which has its special tokens."""
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _ended(self, ids: list[int], start: int) -> list[int]:
        """Return ids whose target, from `start` on, ends with an end: as they are, or with EOS behind them."""
        if self._ends(ids[start:]):
            return ids
        self.counts.ends_added += 1
        return [*ids, self.ends[0]]

    def _ends(self, ids: Sequence[int]) -> bool:
        """Whether the last of the ids that is more than white space is an end."""
        for one in reversed(ids):
            if one in self.ends:
                return True
            if self.tokenizer.decode([one]).strip():
                return False
        return False

    def _fits(self, rows: Sequence[Sequence[int]], start: int, where: str) -> bool:
        """Whether none of `rows` is longer than the limit; a row that is longer is counted.

        Raises:
            DataError: the target, which begins at `start`, would be cut away whole.
        """
        longest, limit = max(map(len, rows)), self.limits.length
        if longest <= limit:
            return True
        if start >= limit and self.limits.overlong == TRUNCATE:
            got = f"{where}: {start} tokens before the answer"
            fix = f"Raise {self.limits.setting}, or leave such rows out with {self.limits.ways}."
            expected = f"less than {self.limits.setting} {limit}, so that a part of the answer fits"
            raise DataError(self.setting, got, expected, fix)
        self.counts.overlong += 1
        return False
