"""Rollouts as text for a reward model with its own tokenizer, with the character spans of all tokens."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import nn

from apportion.errors import ModelError
from apportion.models.pretrained import named_positions
from apportion.models.text.template import answer
from apportion.models.text.token_spans import PolicyText, Span


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
    tokenizer: Any,
    policy: PolicyText,
    prompt: Sequence[int],
    response: Sequence[int],
    *,
    row: int = 0,
    ended: bool = True,
) -> RenderedText:
    """Return a rollout as text for the reward model with `tokenizer`; `row` is its number, for errors.

    A text prompt is followed by the response. A conversation is rendered, with the response as its next turn, by the
    reward model's own chat template; without one its turns are joined by line breaks. A response that was cut off (not
    `ended`, where the policy ends its texts itself: `PolicyText.cuts`) gets no end of turn.

    Raises:
        ModelError, ScoreError: as `template.answer`.
    """
    decoded = policy.decode_response(prompt, response)
    turns = policy.conversations.get(tuple(prompt))
    if turns is not None and tokenizer.chat_template:
        found = answer(tokenizer, turns, decoded.text, row)
        after = found.after if ended or not policy.cuts else ""
        return RenderedText(found.before + found.shown + after, [found.place(span) for span in decoded.spans], True)
    before = decoded.before if turns is None else joined(turns)
    start = len(before)
    return RenderedText(before + decoded.text, [(start + first, start + end) for first, end in decoded.spans], False)


def joined(turns: Sequence[Mapping[str, Any]]) -> str:
    """Return the contents of turns, a line each; a last turn of the assistant is continued by what follows."""
    text = "".join(f"{turn['content']}\n" for turn in turns)
    return text.removesuffix("\n") if turns and turns[-1].get("role") == "assistant" else text


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


def check_embeddings(field: str, model: Any, tokenizer: Any, rows: Iterable[Sequence[int]] = ()) -> None:
    """Raise ModelError for a model without an embedding for an id in `rows`, or for padding, EOS or BOS.

    Unused tokens may have no embedding: a tokenizer may have more tokens than the model.
    """
    count = embedding_count(model)
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
    limit = position_limit(model)
    return int(tokenizer.model_max_length) if limit is None else limit


def position_limit(model: Any) -> int | None:
    """Return the number of positions that the model has, or None where it names none."""
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding) and module.padding_idx is not None:
            return module.num_embeddings - module.padding_idx - 1  # RoBERTa's positions start after the pad's id
    return named_positions(model.config.get_text_config(), "max_position_embeddings")


def embedding_count(model: Any) -> int:
    """Return the number of ids that the model has an embedding for. Raises ModelError where it has no such table."""
    try:
        return len(model.get_input_embeddings().weight)  # not num_embeddings: I-BERT's layer has none
    except (AttributeError, NotImplementedError) as error:  # CANINE hashes characters, Perceiver embeds latents
        got = f"{type(model).__name__}, which has no table with an embedding for each id"
        raise ModelError("model", got, "a model of token ids", "Use a model of another family.") from error
