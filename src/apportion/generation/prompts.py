"""Prompts of a run: loaded, tokenised, checked against the context, and served in a seeded order."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from apportion.config.sections import SamplingConfig
from apportion.data import BadRows, Prompt, Row, read_prompts
from apportion.data.bad_rows import check_count
from apportion.data.conversations import Conversation
from apportion.errors import ConfigError, DataError
from apportion.models.text.chat import Rendered, as_text, check_variables, render_conversation

SHOWN = 5  # prompts that one error names


def load_prompts(
    source: str,
    part: str,
    bad: BadRows | None = None,
    columns: Collection[str] | None = (),
    split: str | None = None,
) -> list[Prompt]:
    """Return prompts: texts or conversations, with their rows; `part` is for the built-in set only.

    `bad` records invalid rows; None makes the first of them an error. `columns` are kept beside the prompts, None: all.
    `split` is that of a folder or a hub dataset; None is "train", or the only one.
    """
    return read_prompts(source, part if source == "imdb" else None, bad=bad, columns=columns, split=split)


@dataclass
class EncodedPrompts:
    """Prompts as ids.

    Attributes:
        prompts: those that can be used. texts: their contents, conversations in the form that was rendered, with their
            tools and variables. rows: the ids of each.
        conversations: the turns of those that are conversations, with contents as text, by their ids.
        hidden: arguments of tool calls that the chat template leaves out, with their places.
    """

    prompts: list[Prompt] = field(default_factory=list)
    texts: list[Any] = field(default_factory=list)
    rows: list[list[int]] = field(default_factory=list)
    conversations: dict[tuple[int, ...], Conversation] = field(default_factory=dict)
    hidden: list[str] = field(default_factory=list)

    @property
    def columns(self) -> list[Mapping[str, Any]]:
        """The columns that were kept of each prompt's row, the same in all: None where a row has none of that name."""
        names = sorted(frozenset[str]().union(*(prompt.columns for prompt in self.prompts)))
        return [{name: prompt.columns.get(name) for name in names} for prompt in self.prompts] if names else []


def limit_of(sampling: SamplingConfig, context: int) -> int:
    """Return the most tokens of a prompt whose response fits into the policy's context. Raises ConfigError for none."""
    limit = min(sampling.max_prompt_tokens, context - sampling.max_new_tokens)
    if limit < 1:
        expected = f"less than the policy's context of {context} tokens"
        raise ConfigError("sampling.max_new_tokens", sampling.max_new_tokens, expected, "Lower it.")
    return limit


def encode_prompts(
    prompts: Sequence[Prompt],
    tokenizer: Any,
    sampling: SamplingConfig,
    seed: int,
    context: int,
    bad: BadRows | None = None,
    count: int | None = None,
    embeddings: int | None = None,
) -> EncodedPrompts:
    """Return the first `count` usable prompts (None: all) as ids, each checked.

    A conversation is rendered by the chat template; prompts are truncated to a seeded number of tokens if configured.

    Args:
        context: tokens that the policy has positions for. embeddings: ids that it has an embedding for.
        bad: records the prompts that cannot be used, and leaves them out; None makes them an error.

    Raises:
        DataError: as `render_conversation`; prompts that are empty, longer than the limit or the context allows, have
            a token without an embedding, or begin with BOS twice: one error counts them and names the first, with their
            tokens and rows. With `bad`: more such prompts than usable ones.
        ConfigError: max_new_tokens leaves no room, or variables that the chat template does not have.
    """
    found, left, limit = EncodedPrompts(), list(prompts), limit_of(sampling, context)
    checks = _Checks(tokenizer, sampling, limit, context, embeddings)
    encoder = _Encoder(prompts, tokenizer, sampling, seed)
    out = 0
    first: DataError | None = None
    while left and (count is None or len(found.rows) < count):
        size = len(left) if count is None else count - len(found.rows)
        block, left = left[:size], left[size:]
        before = len(prompts) - len(left) - len(block)
        problems = encoder.add(found, block, before, checks, bad)
        out, first = out + len(problems), first or (problems[0] if problems else None)
    if bad is not None:
        source = prompts[0].where.rpartition(", ")[0] if prompts else "prompts"
        check_count(source or "prompts", len(found.rows), out, first, "prompts")
    return found


def encoded(
    prompts: Sequence[Prompt], tokenizer: Any, sampling: SamplingConfig, seed: int, bad: BadRows | None = None
) -> EncodedPrompts:
    """Return prompts as `encode_prompts` does, without a check of their length and their beginning."""
    found = EncodedPrompts()
    _Encoder(prompts, tokenizer, sampling, seed).add(found, prompts, 0, None, bad)
    return found


def conversations(
    texts: Sequence[Any], rows: Sequence[Sequence[int]], sampling: SamplingConfig
) -> dict[tuple[int, ...], Any]:
    """Return the turns of prompts that are conversations, by their ids (`rows`).

    A conversation that is truncated to its first tokens is treated as text.
    """
    if sampling.prompt_tokens is not None:
        return {}
    return {tuple(row): text for text, row in zip(texts, rows, strict=True) if not isinstance(text, str)}


class _Encoder:
    """Turns prompts into ids, in their order: the number of tokens that each is cut to comes from one generator."""

    def __init__(self, prompts: Sequence[Prompt], tokenizer: Any, sampling: SamplingConfig, seed: int) -> None:
        self.tokenizer, self.sampling = tokenizer, sampling
        self.generator = torch.Generator().manual_seed(seed)
        self.variables = sampling.chat_template_kwargs or {}
        if not self.variables:
            return
        if all(isinstance(prompt.content, str) for prompt in prompts):
            fix = "Remove the setting, or give prompts as lists of role and content."
            raise ConfigError("sampling.chat_template_kwargs", self.variables, "prompts that are conversations", fix)
        check_variables("sampling.chat_template_kwargs", tokenizer, self.variables)

    def add(
        self, found: EncodedPrompts, prompts: Sequence[Prompt], before: int, checks: _Checks | None, bad: BadRows | None
    ) -> list[DataError]:
        """Add the usable ones of `prompts`, which follow `before` others, to `found`; return the others' errors."""
        errors: list[DataError] = []
        unusable: list[tuple[int, Prompt, list[int]]] = []
        cuts = self._cuts(len(prompts))
        for number, (prompt, cut) in enumerate(zip(prompts, cuts, strict=True), before + 1):
            try:
                row, rendered = self._encode(prompt, cut)
                if checks is not None and not checks.accepts(row):
                    unusable.append((number, prompt, row))
                    if bad is not None:
                        raise checks.error([unusable[-1]], before + len(prompts))
            except DataError as error:
                if bad is None:
                    raise
                where = prompt.where or f"prompt {number}"
                bad.add("prompts", Row({"prompt": prompt.content}, where), error)
                errors.append(error)
                continue
            found.prompts.append(prompt)
            found.rows.append(row)
            found.texts.append(prompt.content if rendered is None else rendered.turns)
            if rendered is not None:
                found.hidden += [f"{prompt.where}: {one}" for one in rendered.hidden]
                if cut is None:  # one that is cut is text
                    found.conversations[tuple(row)] = as_text(rendered.turns)
        if unusable and bad is None:
            assert checks is not None
            raise checks.error(unusable, before + len(prompts))
        return errors

    def _encode(self, prompt: Prompt, cut: int | None) -> tuple[list[int], Rendered | None]:
        """Return (the first `cut` ids, a conversation as rendered)."""
        if isinstance(prompt.content, str):
            # a token is never longer than 50 characters of ordinary text
            most = None if self.sampling.prompt_tokens is None else 50 * self.sampling.prompt_tokens[1]
            return list(self.tokenizer(prompt.content[:most])["input_ids"])[:cut], None
        given = prompt.content
        tools = getattr(given, "tools", None)
        variables = {**self.variables, **getattr(given, "template_kwargs", {})}
        made = Conversation(given, tools, variables)
        rendered = render_conversation("prompts", self.tokenizer, made, where=prompt.where)
        # the template writes BOS itself
        ids = list(self.tokenizer(rendered.text, add_special_tokens=False)["input_ids"])
        return ids[:cut], rendered

    def _cuts(self, count: int) -> list[int] | list[None]:
        if self.sampling.prompt_tokens is None:
            return [None] * count
        low, high = self.sampling.prompt_tokens
        cuts: list[int] = torch.randint(low, high + 1, (count,), generator=self.generator).tolist()
        return cuts


class _Checks:
    """What makes a prompt's ids usable: at least one, room for the response, embeddings, and BOS once."""

    def __init__(
        self, tokenizer: Any, sampling: SamplingConfig, limit: int, context: int, embeddings: int | None = None
    ) -> None:
        self.tokenizer, self.limit = tokenizer, limit
        pad = tokenizer.pad_token_id  # one that a setting adds gets an embedding
        self.embeddings = None if embeddings is None else max(embeddings, (pad or 0) + 1)
        self.expected = (
            f"1 to {limit} tokens (max_prompt_tokens {sampling.max_prompt_tokens}, context {context}, "
            f"max_new_tokens {sampling.max_new_tokens})"
        )

    def accepts(self, row: Sequence[int]) -> bool:
        """Whether a prompt of these ids can be used."""
        bos = self.tokenizer.bos_token_id
        known = self.embeddings is None or max(row, default=0) < self.embeddings
        return 1 <= len(row) <= self.limit and known and (bos is None or list(row[:2]) != [bos, bos])

    def error(self, unusable: Sequence[tuple[int, Prompt, Sequence[int]]], total: int) -> DataError:
        """Return the error for prompts (number, prompt, ids), of `total`: those that do not fit, else the others'."""
        misfits = [one for one in unusable if not 1 <= len(one[2]) <= self.limit]
        unknown = [one for one in unusable if self.embeddings is not None and max(one[2], default=0) >= self.embeddings]
        if not misfits:
            return self._unknown(unknown, total) if unknown else self._doubled(unusable, total)
        number, prompt, row = misfits[0]
        got = f"{len(row)} tokens: {str(prompt.content)[:40]}…{f' ({prompt.where})' * bool(prompt.where)}"
        if len(misfits) > 1:
            others = [_named(one) for one in misfits[1:SHOWN]] + ["…"] * (len(misfits) > SHOWN)
            got = f"{got}; {len(misfits)} of {total} do not fit, also {', '.join(others)}"
        fix = "Shorten it, set sampling.prompt_tokens to keep only its beginning, or leave such rows out with "
        return DataError(f"prompt {number}", got, self.expected, f"{fix}skip_bad_rows: true.")

    def _unknown(self, unusable: Sequence[tuple[int, Prompt, Sequence[int]]], total: int) -> DataError:
        token = max(unusable[0][2])
        names = ", ".join(_named(one) for one in unusable[:SHOWN])
        got = f"{self.tokenizer.convert_ids_to_tokens(token)!r} ({token}) in prompts that the policy cannot read: "
        got += f"{len(unusable)} of {total}: {names}{', …' * (len(unusable) > SHOWN)}"
        fix = "Use the tokenizer that it was trained with, or leave such rows out with skip_bad_rows: true."
        return DataError("prompts", got, f"ids below the policy's {self.embeddings} embeddings", fix)

    def _doubled(self, unusable: Sequence[tuple[int, Prompt, Sequence[int]]], total: int) -> DataError:
        bos = f"BOS {self.tokenizer.bos_token!r} ({self.tokenizer.bos_token_id})"
        names = ", ".join(_named(one) for one in unusable[:SHOWN])
        got = f"{bos} begins prompts twice in {len(unusable)} of {total}: {names}{', …' * (len(unusable) > SHOWN)}"
        fix = "Remove it from the texts or from the chat template: the tokenizer adds one already."
        return DataError("beginning of text", got, "one BOS at the beginning of a prompt", fix)


def _named(one: tuple[int, Prompt, Sequence[int]]) -> str:
    number, prompt, row = one
    return f"prompt {number} ({len(row)} tokens{f', {prompt.where}' * bool(prompt.where)})"


class PromptStream:
    """Serves prompts in an order that depends only on the seed and the step, so that a resume needs no state."""

    def __init__(
        self,
        prompts: Sequence[Prompt],
        tokenizer: Any,
        sampling: SamplingConfig,
        seed: int,
        context: int,
        bad: BadRows | None = None,
        embeddings: int | None = None,
    ) -> None:
        self.seed = seed
        self.encoded = encode_prompts(prompts, tokenizer, sampling, seed, context, bad, embeddings=embeddings)
        self.rows, self.conversations = self.encoded.rows, self.encoded.conversations
        self.columns = self.encoded.columns

    def places(self, step: int, count: int) -> list[int]:
        """Return the places in `rows` of the prompts of batch `step` (from 1); each pass over them has a new order."""
        first = (step - 1) * count
        return [self._order(i // len(self.rows))[i % len(self.rows)] for i in range(first, first + count)]

    def take(self, step: int, count: int) -> list[list[int]]:
        """Return the ids of the `count` prompts of batch `step`."""
        return [self.rows[place] for place in self.places(step, count)]

    def _order(self, epoch: int) -> list[int]:
        if getattr(self, "_cached", (None, None))[0] != epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self._cached = (epoch, torch.randperm(len(self.rows), generator=generator).tolist())
        return self._cached[1]
