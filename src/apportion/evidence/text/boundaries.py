"""Response tokens that start a sentence or a phrase: evidence from the text, without a model pass."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from apportion.evidence.text.phrases import check_parser, parse, phrase_starts
from apportion.evidence.text.sentences import sentence_starts
from apportion.registry import EvidenceKey
from apportion.types import Rollouts

Spans = list[tuple[int, int]]
SENTENCES, PHRASES, FALLBACK = "sentence_boundaries", "phrase_boundaries", "phrase_fallback"
BOUNDARIES = frozenset({SENTENCES, PHRASES, FALLBACK})
MAX_TOKENS = 5


def check_packages(needs: frozenset[str]) -> None:
    """Raise ConfigError where `needs` require a package that is not installed."""
    if _needs_parser(needs):
        check_parser()


def _needs_parser(needs: frozenset[str]) -> bool:
    return any(EvidenceKey.of(need).name in (PHRASES, FALLBACK) for need in needs)


def text_boundaries(
    tokenizer: Any,
    rollouts: Rollouts,
    needs: frozenset[str],
    spans: Callable[[Any, Sequence[int]], Spans] | None = None,
) -> dict[str, Tensor]:
    """Return the needed ones of "sentence_boundaries" and "phrase_boundaries" (B,T) bool, True on first tokens.

    With the latter comes "phrase_fallback" (B,) float: 1 where a row's tokens cannot be located in its text (bytes
    that are not characters), so that n-grams of `max_tokens` replace its phrases.

    The text is that of the sampled tokens, each turn separately. A token belongs to the sentence or phrase of its
    first character other than white space; a token of only white space belongs to that of the token before it.

    Args:
        needs: names of evidence; "phrase_boundaries" may carry `max_tokens` (5).
        spans: (tokenizer, ids) -> the [start, end) of each token in the decoded text.
    """
    spans = spans or prefix_spans
    mask = rollouts.mask
    keys = [key for key in map(EvidenceKey.of, needs) if key.name != FALLBACK]
    boundaries: dict[str, Tensor] = {key: torch.zeros(mask.shape, dtype=torch.bool) for key in keys}
    fallback = torch.zeros(len(mask))
    for row, columns in pieces(mask, rollouts.turn):
        ids = rollouts.response_ids[row, columns].tolist()
        text = decode(tokenizer, ids)
        anchors = [_anchor(text, *span) for span in spans(tokenizer, ids)]
        broken = "�" in text or anchors != sorted(anchors)
        fallback[row] = max(float(fallback[row]), float(broken))
        for key in keys:
            if key.name == SENTENCES:
                first = first_tokens(anchors, sentence_starts(text))
            else:
                most = key.settings.get("max_tokens", MAX_TOKENS)
                first = list(range(0, len(ids), most)) if broken else phrase_tokens(text, anchors, most)
            boundaries[key][row, [columns[i] for i in first]] = True
    boundaries |= {FALLBACK: fallback} if _needs_parser(needs) else {}
    return {name: value.to(mask.device) for name, value in boundaries.items()}


def phrase_tokens(text: str, anchors: Sequence[int], most: int) -> list[int]:
    """Return the first token of each phrase of `text` with at most `most` tokens; `anchors` are the tokens' offsets."""
    starts: list[int] = []
    trees = parse(text)
    begins = [word.start for tree in trees for word in tree]
    owners = [max(0, bisect_right(begins, at) - 1) for at in anchors]  # the word of each token
    first = 0
    for tree in trees:
        tokens = [bisect_right(owners, first + i) - bisect_left(owners, first + i) for i in range(len(tree))]
        for word in phrase_starts([word.head for word in tree], tokens, most):
            starts.append(bisect_left(owners, first + word))
        first += len(tree)
    return sorted({token for token in starts if token < len(anchors)})


def first_tokens(anchors: Sequence[int], starts: Sequence[int]) -> list[int]:
    """Return the index of the first token at or after each character in `starts`, each once; both in order."""
    tokens = {bisect_left(anchors, start) for start in starts}
    return sorted(token for token in tokens if token < len(anchors))


def pieces(mask: Tensor, turn: Tensor | None) -> list[tuple[int, list[int]]]:
    """Return (row, columns) of each turn's masked tokens; a row's are one piece where `turn` (B,T) is None."""
    result = []
    for row in range(len(mask)):
        columns = mask[row].nonzero().squeeze(1).tolist()
        turns = [0] * len(columns) if turn is None else turn[row, columns].tolist()
        begin = 0
        for i in range(1, len(columns) + 1):
            if i == len(columns) or turns[i] != turns[begin]:
                result.append((row, columns[begin:i]))
                begin = i
    return result


def decode(tokenizer: Any, ids: Sequence[int]) -> str:
    """Return the text of `ids` without special tokens."""
    return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def prefix_spans(tokenizer: Any, ids: Sequence[int]) -> Spans:
    """Return the [start, end) of each token in the decoded text, in order and without gaps.

    A token ends where the text of all tokens up to it stops agreeing with the full text: a character of several tokens
    belongs to the last of them, a special token has an empty span.
    """
    text, spans, begin = decode(tokenizer, ids), [], 0
    for i in range(1, len(ids) + 1):
        end = max(begin, _agree(decode(tokenizer, ids[:i]), text))
        spans.append((begin, end))
        begin = end
    return spans


def _agree(part: str, text: str) -> int:
    """Return the length of the common prefix of `part` and `text`."""
    if text.startswith(part):
        return len(part)
    return next((i for i, (a, b) in enumerate(zip(part, text, strict=False)) if a != b), min(len(part), len(text)))


def _anchor(text: str, start: int, end: int) -> int:
    """Return the offset of a token's first character other than white space, or its start if it has none."""
    body = text[start:end]
    return start + len(body) - len(body.lstrip()) if body.strip() else start
