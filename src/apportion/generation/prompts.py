"""Prompts of a run: loaded, tokenised, checked against the context, and served in a seeded order."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

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


class PromptStream:
    """Prompts as ids, served in an order that depends only on the seed and the step, so that a resume needs no state.

    Attributes:
        prompts: those that can be used. texts: their contents, conversations in the form that was rendered, with their
            tools and variables. rows: the ids of each.
        conversations: the turns of those that are conversations, with contents as text, by their ids; one that is cut
            to its first tokens is text.
        hidden: arguments of tool calls that the chat template leaves out, with their places.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.prompts: list[Prompt] = []
        self.texts: list[Any] = []
        self.rows: list[list[int]] = []
        self.conversations: dict[tuple[int, ...], Conversation] = {}
        self.hidden: list[str] = []
        self._cached: tuple[int, list[int]] = (-1, [])  # a pass over the prompts, and its order

    def add(self, prompt: Prompt, row: list[int], rendered: Rendered | None, whole: bool) -> None:
        """Add a prompt with its ids, a conversation as rendered; `whole` where it was not cut."""
        self.prompts.append(prompt)
        self.rows.append(row)
        self.texts.append(prompt.content if rendered is None else rendered.turns)
        if rendered is not None:
            self.hidden += [f"{prompt.where}: {one}" for one in rendered.hidden]
            if whole:
                self.conversations[tuple(row)] = as_text(rendered.turns)

    @cached_property
    def columns(self) -> list[Mapping[str, Any]]:
        """The columns that were kept of each prompt's row, the same in all: None where a row has none of that name."""
        names = sorted(frozenset[str]().union(*(prompt.columns for prompt in self.prompts)))
        return [{name: prompt.columns.get(name) for name in names} for prompt in self.prompts] if names else []

    def places(self, step: int, count: int) -> list[int]:
        """Return the places in `rows` of the prompts of batch `step` (from 1); each pass over them has a new order."""
        first = (step - 1) * count
        return [self._order(i // len(self.rows))[i % len(self.rows)] for i in range(first, first + count)]

    def _order(self, epoch: int) -> list[int]:
        if self._cached[0] != epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self._cached = (epoch, torch.randperm(len(self.rows), generator=generator).tolist())
        return self._cached[1]


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
    context: int | None,
    bad: BadRows | None = None,
    count: int | None = None,
    embeddings: int | None = None,
) -> PromptStream:
    """Return the first `count` usable prompts (None: all) as ids, each checked.

    A conversation is rendered by the chat template; prompts are truncated to a seeded number of tokens if configured.

    Args:
        context: tokens that the policy has positions for; None checks nothing of the ids.
        embeddings: ids that it has an embedding for; None: of every one.
        bad: records the prompts that cannot be used, and leaves them out; None makes them an error.

    Raises:
        DataError: as `render_conversation`; prompts that are empty, longer than the limit or the context allows, have
            a token without an embedding, or begin with BOS twice: one error counts them and names the first, with their
            tokens and rows. With `bad`: more such prompts than usable ones.
        ConfigError: max_new_tokens leaves no room, or variables that the chat template does not have.
    """
    checks = None
    if context is not None:
        checks = _Checks(tokenizer, sampling, limit_of(sampling, context), context, embeddings)
    _check_variables(prompts, tokenizer, sampling)
    found, generator = PromptStream(seed), torch.Generator().manual_seed(seed)
    problems: list[DataError] = []
    unusable: list[_Unusable] = []
    for number, prompt in enumerate(prompts, 1):
        if count is not None and len(found.rows) + len(unusable) >= count:
            break
        cut = _cut(sampling, generator)
        try:
            row, rendered = _encode(prompt, tokenizer, sampling, cut)
            if checks is not None and not checks.accepts(row):
                one = _Unusable(number, prompt, row)
                if bad is not None:
                    raise checks.error([one], len(prompts))
                unusable.append(one)
                continue
        except DataError as error:
            if bad is None:
                raise
            bad.add("prompts", Row({"prompt": prompt.content}, prompt.where or f"prompt {number}"), error)
            problems.append(error)
            continue
        found.add(prompt, row, rendered, whole=cut is None)
    if unusable and checks is not None:
        raise checks.error(unusable, min(len(prompts), count or len(prompts)))
    if bad is not None:
        source = prompts[0].where.rpartition(", ")[0] if prompts else "prompts"
        check_count(source or "prompts", len(found.rows), len(problems), next(iter(problems), None), "prompts")
    return found


def _check_variables(prompts: Sequence[Prompt], tokenizer: Any, sampling: SamplingConfig) -> None:
    """Raise ConfigError for variables in the settings that no chat template is given, or that it does not have."""
    variables = sampling.chat_template_kwargs
    if not variables:
        return
    if all(isinstance(prompt.content, str) for prompt in prompts):
        fix = "Remove the setting, or give prompts as lists of role and content."
        raise ConfigError("sampling.chat_template_kwargs", variables, "prompts that are conversations", fix)
    check_variables("sampling.chat_template_kwargs", tokenizer, variables)


def _cut(sampling: SamplingConfig, generator: torch.Generator) -> int | None:
    """Return the number of tokens that the next prompt is cut to, None for all of them."""
    if sampling.prompt_tokens is None:
        return None
    low, high = sampling.prompt_tokens
    return int(torch.randint(low, high + 1, (), generator=generator))


def _encode(
    prompt: Prompt, tokenizer: Any, sampling: SamplingConfig, cut: int | None
) -> tuple[list[int], Rendered | None]:
    """Return (the first `cut` ids, a conversation as rendered)."""
    given = prompt.content
    if isinstance(given, str):
        # a token is never longer than 50 characters of ordinary text
        most = None if sampling.prompt_tokens is None else 50 * sampling.prompt_tokens[1]
        return list(tokenizer(given[:most])["input_ids"])[:cut], None
    variables = {**(sampling.chat_template_kwargs or {}), **getattr(given, "template_kwargs", {})}
    made = Conversation(given, getattr(given, "tools", None), variables)
    rendered = render_conversation("prompts", tokenizer, made, where=prompt.where)
    # the template writes BOS itself
    return list(tokenizer(rendered.text, add_special_tokens=False)["input_ids"])[:cut], rendered


class _Unusable(NamedTuple):
    """A prompt that cannot be used: its number from 1, itself, its ids."""

    number: int
    prompt: Prompt
    row: list[int]

    def __str__(self) -> str:
        where = f", {self.prompt.where}" * bool(self.prompt.where)
        return f"prompt {self.number} ({len(self.row)} tokens{where})"


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
        return 1 <= len(row) <= self.limit and self._known(row) and (bos is None or list(row[:2]) != [bos, bos])

    def _known(self, row: Sequence[int]) -> bool:
        """Whether the policy has an embedding for every id."""
        return self.embeddings is None or max(row, default=0) < self.embeddings

    def error(self, unusable: Sequence[_Unusable], total: int) -> DataError:
        """Return the error for prompts, of `total`: for those that do not fit, else for the others."""
        misfits = [one for one in unusable if not 1 <= len(one.row) <= self.limit]
        unknown = [one for one in unusable if not self._known(one.row)]
        if not misfits:
            return self._unknown(unknown, total) if unknown else self._doubled(unusable, total)
        number, prompt, row = misfits[0]
        got = f"{len(row)} tokens: {str(prompt.content)[:40]}…{f' ({prompt.where})' * bool(prompt.where)}"
        if len(misfits) > 1:
            others = [str(one) for one in misfits[1:SHOWN]] + ["…"] * (len(misfits) > SHOWN)
            got = f"{got}; {len(misfits)} of {total} do not fit, also {', '.join(others)}"
        fix = "Shorten it, set sampling.prompt_tokens to keep only its beginning, or leave such rows out with "
        return DataError(f"prompt {number}", got, self.expected, f"{fix}skip_bad_rows: true.")

    def _unknown(self, unusable: Sequence[_Unusable], total: int) -> DataError:
        token = max(unusable[0].row)
        names = ", ".join(map(str, unusable[:SHOWN]))
        got = f"{self.tokenizer.convert_ids_to_tokens(token)!r} ({token}) in prompts that the policy cannot read: "
        got += f"{len(unusable)} of {total}: {names}{', …' * (len(unusable) > SHOWN)}"
        fix = "Use the tokenizer that it was trained with, or leave such rows out with skip_bad_rows: true."
        return DataError("prompts", got, f"ids below the policy's {self.embeddings} embeddings", fix)

    def _doubled(self, unusable: Sequence[_Unusable], total: int) -> DataError:
        bos = f"BOS {self.tokenizer.bos_token!r} ({self.tokenizer.bos_token_id})"
        names = ", ".join(map(str, unusable[:SHOWN]))
        got = f"{bos} begins prompts twice in {len(unusable)} of {total}: {names}{', …' * (len(unusable) > SHOWN)}"
        fix = "Remove it from the texts or from the chat template: the tokenizer adds one already."
        return DataError("beginning of text", got, "one BOS at the beginning of a prompt", fix)
