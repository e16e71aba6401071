"""Character spans of the tokens of a sequence in its decoded text, for any tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

BROKEN = "\ufffd"  # the decoding of bytes that are not, or not yet, a character

Span = tuple[int, int]


class TokenText(NamedTuple):
    """A response as text: the text before it, the text itself, and each token's span [first, end) in it.

    The spans cover `text` in order (neither firsts nor ends ever fall); tokens that form one character together overlap
    there. A token without characters has an empty span, in no particular order.
    """

    before: str
    text: str
    spans: list[Span]


@dataclass(frozen=True)
class PolicyText:
    """The decoding of a policy's ids to text.

    Attributes:
        tokenizer: the policy's, of any kind.
        conversations: the turns ({role, content}) of prompts by the prompt's ids; {} for plain text.
        cuts: whether a response that has not ended was cut off (`sampling.stop: eos`), and is an unfinished turn.
        special: ids without text: end of text, padding, turn markers and all tokens marked as special.
    """

    tokenizer: Any
    conversations: Mapping[tuple[int, ...], Sequence[Mapping[str, Any]]] = field(default_factory=dict)
    cuts: bool = False
    special: frozenset[int] = field(init=False)

    def __post_init__(self) -> None:
        marked = {i for i, token in self.tokenizer.added_tokens_decoder.items() if token.special}
        object.__setattr__(self, "special", frozenset(marked | set(self.tokenizer.all_special_ids)))

    def decode_response(self, prompt: Sequence[int], response: Sequence[int]) -> TokenText:
        """Return the text of the ids `response` after the ids `prompt`, without special tokens, and each token's span.

        Both are decoded together, since many decoders treat the start of a text specially. The spans come from
        decoding, never from re-encoding the text, which may give other ids. A character that the prompt's last token
        starts and the response completes belongs to the response.
        """
        before = [i for i in prompt if i not in self.special]
        places = [place for place, i in enumerate(response) if i not in self.special]
        text, start, decoded = spans_after(self._decode, before, [response[place] for place in places])
        spans: list[Span | None] = [None] * len(response)
        for place, (first, end) in zip(places, decoded, strict=True):
            spans[place] = (first - start, end - start)
        return TokenText(text[:start], text[start:], _filled(spans))

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _filled(spans: Iterable[Span | None]) -> list[Span]:
    """Return `spans` with empty ones, at the end of the span before, for the tokens without a span."""
    filled, end = [], 0
    for span in spans:
        first, end = (end, end) if span is None else (span[0], max(end, span[1]))
        filled.append((first, end))
    return filled


def spans_after(
    decode: Callable[[Sequence[int]], str], prompt: Sequence[int], response: Sequence[int]
) -> tuple[str, int, list[Span]]:
    """Return (text of both, offset of the response in it, span of each response token in it).

    Decoding every prefix is exact and quadratic. Most tokens depend only on the token before them, so decoding in small
    groups is tried first, and used if the concatenated pieces are the text.
    """
    ids, begin = [*prompt, *response], len(prompt)
    full = decode(ids)
    start = common(decode(prompt), full) if response else len(full)
    spans = _stepwise(decode, ids, begin, start, full)
    if spans is None:
        spans = group_spans([decode(ids[:end]) for end in range(begin + 1, len(ids))] + [full], start)
    return full, start, spans


def _stepwise(
    decode: Callable[[Sequence[int]], str], ids: list[int], begin: int, start: int, full: str
) -> list[Span] | None:
    """Return the spans of ids[begin:] by decoding a few tokens at a time, or None where the pieces do not
    match.

    A group is the fewest tokens that end on a complete character; it is decoded together with the group before it.
    """
    anchor, known, position = 0, full[:start], start
    spans: list[Span] = []
    texts: list[str] = []
    for end in range(begin + 1, len(ids) + 1):
        texts.append(decode(ids[anchor:end]))
        if texts[-1].endswith(BROKEN) and end < len(ids):
            continue
        piece = texts[-1][len(known) :]
        if not texts[-1].startswith(known) or not full.startswith(piece, position):
            return None
        shift = position - len(known)
        spans += [(first + shift, last + shift) for first, last in group_spans(texts, len(known))]
        position += len(piece)
        anchor, texts = end - len(texts), []
        known = decode(ids[anchor:end])
    return spans if position == len(full) else None


def group_spans(texts: Sequence[str], start: int) -> list[Span]:
    """Return the span of each token in texts[-1], given the decoded text after each of them; the first is at `start`.

    The part that agrees with the final text is certain. A token whose decoded text is longer than that starts a
    character that a later one completes: both cover it. A token that adds nothing after a broken character belongs to
    it.
    """
    full = texts[-1]
    spans: list[Span] = []
    certain, before = start, (start, start)
    for text in texts:
        agreed = common(text, full)
        first, certain = certain, max(certain, agreed)
        end = min(certain + (agreed < len(text)), len(full))
        if end == first > start and full[first - 1] == BROKEN:
            first -= 1
        before = max(first, before[0]), max(end, before[1])
        spans.append(before)
    return spans


def common(one: str, two: str) -> int:
    """Return the length of the common prefix."""
    if two.startswith(one):
        return len(one)
    return next((i for i, (a, b) in enumerate(zip(one, two, strict=False)) if a != b), min(len(one), len(two)))
