"""Given answers: a file of `apportion sample`, or one of its form, matched with the prompts of the comparison."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from apportion.data import Row, read_rows
from apportion.data.answers.item_id import canonical_json
from apportion.errors import DataError
from apportion.stages.evaluate.comparison.entries import Entry


@dataclass(frozen=True)
class Answers:
    """The answers of one policy, by prompt and answer.

    Attributes:
        texts: without special tokens. ids: in the comparison's tokenizer, end tokens included.
        sampled: whether `ids` are those that the policy sampled; else the texts were tokenised again.
        ended: False where an answer was cut off; None where nobody says.
        logprobs: nats a token, of `ids` under the policy, where a file has them.
    """

    texts: Sequence[Sequence[str]]
    ids: Sequence[Sequence[list[int]]]
    sampled: bool
    ended: Sequence[Sequence[bool | None]]
    logprobs: Sequence[Sequence[list[float]]] | None = None


def read_given(field: str, entry: Entry, contents: Sequence[Any], wanted: Mapping[str, Any]) -> list[Row]:
    """Return the rows of an answers file, one for each of `contents`, the prompts, in their order.

    Args:
        wanted: settings of sampling that a row's own must have, where it has them.

    Raises:
        DataError: a prompt without a row, rows without answers, or answers sampled at another temperature.
    """
    by_prompt: dict[str, list[Row]] = defaultdict(list)
    for row in read_rows(entry.folder, ("prompt", "completions"), field=field):
        by_prompt[canonical_json(row["prompt"])].append(_checked(row, field))
    found = []
    for number, content in enumerate(contents, 1):
        rows = by_prompt[canonical_json(content)]
        if not rows:
            got = f"{entry.given} without an answer to prompt {number}, {str(content)[:60]!r}"
            fix = "Give --prompts the prompts that it answers (its own file will do), or sample it on these."
            raise DataError(field, got, "answers to every prompt that the others answer", fix)
        row = rows.pop(0) if len(rows) > 1 else rows[0]  # of a prompt that is there twice each row once
        settings = row.get("settings")
        differs = next(
            (k for k, v in wanted.items() if isinstance(settings, Mapping) and settings.get(k, v) != v), None
        )
        if differs is not None and settings is not None:
            got = f"{entry.given}: {differs} {settings[differs]!r}"
            fix = f"Pass --sampling.{differs} {settings[differs]}, or sample again."
            raise DataError(field, got, f"the comparison's {differs}, {wanted[differs]!r}", fix)
        found.append(row)
    return found


def _checked(row: Row, field: str) -> Row:
    """Return `row` if its completions are texts, and the lists beside them are as long."""
    completions = row["completions"]
    if not isinstance(completions, list) or not completions or not all(isinstance(one, str) for one in completions):
        got = f"{row.where}: completions = {completions!r:.60}"
        raise DataError(field, got, "a list of at least one text", "Write the rows of `apportion sample`.")
    try:
        "".join(completions).encode()
    except UnicodeEncodeError as error:
        fix = "Write the complete character or remove it."
        raise DataError(field, f"{row.where}: a lone surrogate in completions", "valid Unicode", fix) from error
    for name in ("completion_ids", "logprobs", "ended"):
        value = row.get(name)
        if value is not None and (not isinstance(value, list) or len(value) != len(completions)):
            got = f"{row.where}: {name} = {value!r:.60}"
            raise DataError(
                field, got, f"a list of {len(completions)}, one a completion", "Fix it, or drop the column."
            )
        if value is not None and not all(map(PARTS[name], value)):
            got = f"{row.where}: {name} = {value!r:.60}"
            raise DataError(field, got, f"{WORDS[name]} for each completion", "Fix it, or drop the column.")
    return row


def _is_numbers(value: Any, kinds: type | tuple[type, ...]) -> bool:
    return isinstance(value, list) and all(isinstance(one, kinds) and not isinstance(one, bool) for one in value)


# column -> whether an entry of it can be used, and what an entry is
PARTS: Mapping[str, Callable[[Any], bool]] = {
    "completion_ids": lambda value: _is_numbers(value, int),
    "logprobs": lambda value: _is_numbers(value, (int, float)),
    "ended": lambda value: value is None or isinstance(value, bool),
}
WORDS = {"completion_ids": "a list of token ids", "logprobs": "a list of numbers", "ended": "true, false or null"}


def given_answers(rows: Sequence[Row], prompts: Sequence[Sequence[int]], tokenizer: Any) -> Answers:
    """Return the answers of an answers file, of prompts with these ids.

    Its ids and log-probabilities are used where the comparison's tokenizer decodes every list of ids to its text.
    """
    texts = [list(row["completions"]) for row in rows]
    ended = [row.get("ended") or [None] * len(row["completions"]) for row in rows]
    own = all(_is_of(row, prompt, tokenizer) for row, prompt in zip(rows, prompts, strict=True))
    if not own:
        return Answers(texts, encode_answers(texts, ended, tokenizer), False, ended)
    ids = [[list(map(int, one)) for one in row["completion_ids"]] for row in rows]
    logprobs = [row.get("logprobs") for row in rows]
    whole = all(_fits(one, row) for one, row in zip(logprobs, ids, strict=True))
    return Answers(texts, ids, True, ended, logprobs if whole else None)  # type: ignore[arg-type]


def _is_of(row: Row, prompt: Sequence[int], tokenizer: Any) -> bool:
    """Whether the tokenizer's texts of a row's ids are its completions, alone or behind the prompt."""
    listed = row.get("completion_ids")
    if listed is None:
        return False
    size = len(tokenizer)
    if any(not isinstance(i, int) or not 0 <= i < size for ids in listed for i in ids):
        return False
    decode = tokenizer.decode
    before = str(decode(list(prompt), skip_special_tokens=True))
    for text, ids in zip(row["completions"], listed, strict=True):
        whole = str(decode([*prompt, *ids], skip_special_tokens=True))
        if text not in (str(decode(ids, skip_special_tokens=True)), whole.removeprefix(before)):
            return False
    return True


def _fits(logprobs: Any, ids: Sequence[Sequence[int]]) -> bool:
    return logprobs is not None and [len(one) for one in logprobs] == [len(one) for one in ids]


def check_positions(
    field: str, entry: Entry, answers: Answers, prompts: Sequence[Sequence[int]], context: int | None
) -> None:
    """Raise DataError where a prompt and an answer of `entry` have more tokens than the start has positions for."""
    if context is None:
        return
    for number, (prompt, group) in enumerate(zip(prompts, answers.ids, strict=True), 1):
        longest = max(map(len, group), default=0)
        if len(prompt) + longest > context:
            got = f"{entry.given}: an answer to prompt {number} of {longest} tokens, behind {len(prompt)} of the prompt"
            fix = "Leave long prompts out, cut the answers, or use a start with a longer context."
            raise DataError(field, got, f"at most {context} tokens in all, the start's context", fix)


def encode_answers(
    texts: Sequence[Sequence[str]], ended: Sequence[Sequence[bool | None]], tokenizer: Any
) -> list[list[list[int]]]:
    """Return the ids of texts in the comparison's tokenizer, with EOS behind those that ended."""
    eos = tokenizer.eos_token_id
    rows = []
    for group, ends in zip(texts, ended, strict=True):
        made = [list(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in group]
        rows.append([ids + [eos] * bool(end and eos is not None) for ids, end in zip(made, ends, strict=True)])
    return rows
