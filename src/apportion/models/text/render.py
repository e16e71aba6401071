"""Rollouts as text for a reward model with its own tokenizer, with the character spans of all tokens."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import count
from typing import Any, NamedTuple

from torch import nn

from apportion.errors import ModelError, ScoreError
from apportion.models.text.token_spans import PolicyText, Span

# a placeholder that locates the response in a rendered chat template; no suffix of it is also a prefix of it, so that
# it cannot be found at a shifted offset together with adjacent characters
MARK = "RESPONSE{}"


class RenderedText(NamedTuple):
    """A rollout as text: prompt and response, and the spans of the policy's response tokens in it."""

    text: str
    spans: list[Span]
    templated: bool  # rendered by the chat template, so that the text contains its special tokens


class Encoded(NamedTuple):
    """A text in the reward model's tokens; special tokens have the empty span (0, 0)."""

    ids: list[int]
    spans: list[Span]


def render(
    tokenizer: Any, policy: PolicyText, prompt: Sequence[int], response: Sequence[int], *, row: int = 0
) -> RenderedText:
    """Return a rollout as text for the reward model with `tokenizer`; `row` is its number, for errors.

    A text prompt is followed by the response. A conversation is rendered, with the response as its next turn, by the
    reward model's own chat template; without one its turns are joined by line breaks.

    Raises:
        ModelError: the template cannot render the conversation, or does not render a response exactly once.
        ScoreError: the template changes this response, so that its position is ambiguous.
    """
    decoded = policy.decode_response(prompt, response)
    turns = policy.conversations.get(tuple(prompt))
    if turns is not None and tokenizer.chat_template:
        text, start, skipped, length = _templated(tokenizer, turns, decoded.text, row)
        spans = [tuple(start + min(max(at - skipped, 0), length) for at in span) for span in decoded.spans]
        return RenderedText(text, spans, True)  # type: ignore[arg-type]
    before = decoded.before if turns is None else "".join(f"{turn['content']}\n" for turn in turns)
    start = len(before)
    return RenderedText(before + decoded.text, [(start + first, start + end) for first, end in decoded.spans], False)


def _templated(
    tokenizer: Any, turns: Sequence[Mapping[str, Any]], response: str, row: int
) -> tuple[str, int, int, int]:
    """Return (text, offset of the response in it, response characters missing at its start, characters rendered)."""
    mark = next(mark for mark in map(MARK.format, count()) if not any(mark in str(turn) for turn in turns))
    marked = _rendered(tokenizer, turns, mark)
    if marked.count(mark) != 1:
        got = f"one that renders a response {marked.count(mark)} times"
        fix = "Give prompts as text, or fix the template: the response cannot be located otherwise."
        raise ModelError("reward_model's chat template", got, "one that renders it once", fix)
    before, after = marked.split(mark)
    text = _rendered(tokenizer, turns, response)
    length = len(text) - len(before) - len(after)
    shown = text[len(before) : len(before) + length] if length >= 0 else ""
    skipped = _skipped(response, shown)
    if before + shown + after != text or skipped is None:
        expected = "a response that the reward model's chat template renders unchanged, or trimmed"
        fix = "The template changes it (such as text in thinking tags), and credit would land on the wrong tokens."
        raise ScoreError("response", response[:60], expected, fix, row=row)
    return text, len(before), skipped, length


def _skipped(response: str, shown: str) -> int | None:
    """Return how many of the response's first characters are missing in its rendered part; None if ambiguous."""
    if shown == response.rstrip() or shown == response:
        return 0
    if shown in (response.strip(), response.lstrip()):
        return len(response) - len(response.lstrip())
    first = response.find(shown)
    return first if shown and first >= 0 and first == response.rfind(shown) else None


def _rendered(tokenizer: Any, turns: Sequence[Mapping[str, Any]], response: str) -> str:
    answered = [*turns, {"role": "assistant", "content": response}]
    try:
        return str(tokenizer.apply_chat_template(answered, tokenize=False, add_generation_prompt=False))
    except Exception as error:  # a template is a program that may raise anything
        got = f"a conversation ({(str(error).splitlines() or [type(error).__name__])[0]})"
        fix = "Give prompts as text, or turns that this reward model's template knows."
        raise ModelError("reward_model's chat template", got, "turns that it can render", fix) from error


def encode(tokenizer: Any, rendered: RenderedText, embeddings: int | None = None) -> Encoded:
    """Return the reward model's tokens of a text, never truncated, with their spans in characters of that text.

    The offsets are the tokenizer's, in the text before normalisation. Some tokenizers exclude spaces from them, so that
    a token of only spaces would be empty: it gets the characters since the token before it.

    Raises:
        ModelError: an id that the model, which has `embeddings` of them, has no embedding for.
    """
    encoding = tokenizer(
        rendered.text,
        add_special_tokens=not rendered.templated,
        return_offsets_mapping=True,
        truncation=False,
        padding=False,
        verbose=False,
    )
    if embeddings is not None and max(encoding["input_ids"], default=0) >= embeddings:
        raise _without_embedding("reward_model", tokenizer, max(encoding["input_ids"]), embeddings)
    spans, end = [], 0
    for first, last in encoding["offset_mapping"]:  # (0, 0) for the special tokens that the tokenizer adds
        spans.append((min(first, end), last) if first == last else (first, last))
        end = max(end, last)
    return Encoded(encoding["input_ids"], spans)


def check_tokenizer(field: str, tokenizer: Any) -> None:
    """Raise ModelError for a tokenizer without character offsets. Needs no weights."""
    if not tokenizer.is_fast:
        fix = "Save it as a fast one (with a tokenizer.json): only those have character offsets."
        expected = "the policy's tokenizer and a decoder, or a fast one"
        raise ModelError(f"{field}'s tokenizer", type(tokenizer).__name__, expected, fix)


def check_model(field: str, model: Any, tokenizer: Any) -> None:
    """Raise ModelError for a model without embeddings for its special tokens or with pooling over positions."""
    check_embeddings(field, model, tokenizer)
    if getattr(model.config, "classifier_pooling", "cls") != "cls":
        got = f"classifier_pooling {model.config.classifier_pooling!r}"
        fix = "Use an encoder that scores its first token: credit needs the attention of that position."
        raise ModelError(field, got, "'cls'", fix)


def check_embeddings(field: str, model: Any, tokenizer: Any, rows: Iterable[Sequence[int]] = ()) -> None:
    """Raise ModelError for a model without an embedding for an id in `rows`, or for padding, EOS or BOS.

    Unused tokens may have no embedding: a tokenizer may have more tokens than the model.
    """
    count = model.get_input_embeddings().num_embeddings
    missing = beyond(tokenizer, count, rows)
    if missing:
        raise _without_embedding(field, tokenizer, missing[-1], count)


def beyond(tokenizer: Any, count: int, rows: Iterable[Sequence[int]] = ()) -> list[int]:
    """Return the ids in `rows`, and of padding, EOS and BOS, that are at least `count`, in order."""
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
            return module.num_embeddings - module.padding_idx - 1  # RoBERTa's positions start after the pad's id
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return int(tokenizer.model_max_length if limit is None else limit)
