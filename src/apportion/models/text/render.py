"""A tokenizer of a reward model's own: a rollout as the text that the model reads, and where its tokens stand in it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import count
from typing import Any, NamedTuple

from torch import nn

from apportion.errors import ModelError, ScoreError
from apportion.models.text.token_spans import PolicyText, Span

# stands for the response while a chat template is asked where it puts it; no end of it is also a beginning of it, so
# that it cannot be found a few characters off, together with what stands beside it
MARK = "RESPONSE{}"


class Reading(NamedTuple):
    """A rollout as text: prompt and response, and the spans of the policy's response tokens in it."""

    text: str
    spans: list[Span]
    templated: bool  # rendered by the chat template, so that special tokens stand in the text already


class Encoded(NamedTuple):
    """A text in the reward model's tokens; special tokens have the empty span (0, 0)."""

    ids: list[int]
    spans: list[Span]


def read_as_text(
    tokenizer: Any, policy: PolicyText, prompt: Sequence[int], response: Sequence[int], *, row: int = 0
) -> Reading:
    """Return what the reward model with `tokenizer` reads of a rollout; `row` is its number, for errors.

    A prompt that was given as text is followed by the response. A prompt that was a conversation goes, with the
    response as its next turn, through the reward model's own chat template; without one its turns are joined by line
    breaks.

    Raises:
        ModelError: the template cannot render the conversation, or does not show a response exactly once.
        ScoreError: the template changes this response, so that its place is not certain.
    """
    said = policy.read(prompt, response)
    turns = policy.conversations.get(tuple(prompt))
    if turns is not None and tokenizer.chat_template:
        text, start, skipped, length = _templated(tokenizer, turns, said.text, row)
        spans = [tuple(start + min(max(at - skipped, 0), length) for at in span) for span in said.spans]
        return Reading(text, spans, True)  # type: ignore[arg-type]
    before = said.before if turns is None else "".join(f"{turn['content']}\n" for turn in turns)
    start = len(before)
    return Reading(before + said.text, [(start + first, start + end) for first, end in said.spans], False)


def _templated(
    tokenizer: Any, turns: Sequence[Mapping[str, Any]], response: str, row: int
) -> tuple[str, int, int, int]:
    """Return (text, where the response begins in it, characters missing at the response's front, characters shown)."""
    mark = next(mark for mark in map(MARK.format, count()) if not any(mark in str(turn) for turn in turns))
    marked = _rendered(tokenizer, turns, mark)
    if marked.count(mark) != 1:
        got = f"one that shows a response {marked.count(mark)} times"
        fix = "Give prompts as text, or fix the template: nothing else says where the response stands."
        raise ModelError("reward_model's chat template", got, "one that shows it once", fix)
    before, after = marked.split(mark)
    text = _rendered(tokenizer, turns, response)
    length = len(text) - len(before) - len(after)
    shown = text[len(before) : len(before) + length] if length >= 0 else ""
    skipped = _skipped(response, shown)
    if before + shown + after != text or skipped is None:
        expected = "a response that the reward model's chat template shows as it is, or trimmed"
        fix = "The template changes it (text in thinking tags, say), and credit would land in the wrong place."
        raise ScoreError("response", response[:60], expected, fix, row=row)
    return text, len(before), skipped, length


def _skipped(response: str, shown: str) -> int | None:
    """Return how many of the response's first characters are missing in what is shown of it; None if not certain."""
    if shown == response.rstrip() or shown == response:
        return 0
    if shown in (response.strip(), response.lstrip()):
        return len(response) - len(response.lstrip())
    first = response.find(shown)
    return first if shown and first >= 0 and first == response.rfind(shown) else None


def _rendered(tokenizer: Any, turns: Sequence[Mapping[str, Any]], response: str) -> str:
    answered = [*turns, {"role": "assistant", "content": response}]
    try:
        return tokenizer.apply_chat_template(answered, tokenize=False, add_generation_prompt=False)
    except Exception as error:  # a template is a program of the model's: whatever it raises is said
        got = f"a conversation ({(str(error).splitlines() or [type(error).__name__])[0]})"
        fix = "Give prompts as text, or turns that this reward model's template knows."
        raise ModelError("reward_model's chat template", got, "turns that it can render", fix) from error


def encode(tokenizer: Any, reading: Reading, embeddings: int | None = None) -> Encoded:
    """Return the reward model's tokens of a text, never cut off, with their spans in characters of that text.

    The offsets are the tokenizer's, which point into the text as it came, before any normalising. Some leave blanks
    out of them, and a token of blanks alone would be empty: it gets the characters since the token before it.

    Raises:
        ModelError: an id has none of the model's so many `embeddings`.
    """
    found = tokenizer(
        reading.text,
        add_special_tokens=not reading.templated,
        return_offsets_mapping=True,
        truncation=False,
        padding=False,
        verbose=False,
    )
    if embeddings is not None and max(found["input_ids"], default=0) >= embeddings:
        raise _without_embedding("reward_model", tokenizer, max(found["input_ids"]), embeddings)
    spans, end = [], 0
    for first, last in found["offset_mapping"]:  # (0, 0) for the special tokens that the tokenizer adds
        spans.append((min(first, end), last) if first == last else (first, last))
        end = max(end, last)
    return Encoded(found["input_ids"], spans)


def check_tokenizer(field: str, tokenizer: Any) -> None:
    """Raise ModelError for a tokenizer that does not say which characters its tokens cover. Needs no weights."""
    if not tokenizer.is_fast:
        fix = "Save it as a fast one (with a tokenizer.json): only those say which characters a token covers."
        expected = "the policy's tokenizer and a decoder, or a fast one"
        raise ModelError(f"{field}'s tokenizer", type(tokenizer).__name__, expected, fix)


def check_model(field: str, model: Any, tokenizer: Any) -> None:
    """Raise ModelError for a model without embeddings for its special tokens, or that reads no single position."""
    check_embeddings(field, model, tokenizer)
    if getattr(model.config, "classifier_pooling", "cls") != "cls":
        got = f"classifier_pooling {model.config.classifier_pooling!r}"
        fix = "Use an encoder that scores its first token: the attention of that one position is what is read."
        raise ModelError(field, got, "'cls'", fix)


def check_embeddings(field: str, model: Any, tokenizer: Any, rows: Iterable[Sequence[int]] = ()) -> None:
    """Raise ModelError for a model without an embedding for an id in `rows`, or for padding, EOS or BOS.

    Tokens that nothing uses may lie beyond its embeddings: a tokenizer may name more than the model was made for.
    """
    count = model.get_input_embeddings().num_embeddings
    lacking = beyond(tokenizer, count, rows)
    if lacking:
        raise _without_embedding(field, tokenizer, lacking[-1], count)


def beyond(tokenizer: Any, count: int, rows: Iterable[Sequence[int]] = ()) -> list[int]:
    """Return the ids in `rows`, and of padding, EOS and BOS, that `count` embeddings do not reach, in order."""
    used = {i for row in rows for i in row if i >= count}
    special = (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id)
    return sorted(used | {i for i in special if i is not None and i >= count})


def _without_embedding(field: str, tokenizer: Any, token: int, count: int) -> ModelError:
    got = f"{tokenizer.convert_ids_to_tokens(token)!r} ({token})"
    fix = "Use the tokenizer that it was trained with, or call `model.resize_token_embeddings` and train it."
    return ModelError(f"{field}'s tokenizer", got, f"ids below the model's {count} embeddings", fix)


def context_limit(model: Any, tokenizer: Any) -> int:
    """Return the longest sequence, in tokens, that the model has positions for, or its tokenizer's limit."""
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding) and module.padding_idx is not None:
            return module.num_embeddings - module.padding_idx - 1  # RoBERTa counts from after the pad's id
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return int(tokenizer.model_max_length if limit is None else limit)
