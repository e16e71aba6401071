"""Transfer of weights from one tokenizer's tokens to another's by the characters that both cover."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from apportion.errors import DataError


class _Characters(NamedTuple):
    """One entry for each pair of a token and a character that it covers: flat indices and the token's width."""

    token: Tensor  # row · N + token
    character: Tensor  # row · size + character
    width: Tensor  # characters of that token


def transfer(weights: Tensor, source: Tensor, target: Tensor) -> Tensor:
    """Return the weights (B,T) that the target tokens get from `weights` (B,K) of the source tokens.

    A source token spreads its weight evenly over its characters, and a character's weight is split equally between the
    target tokens that cover it (several byte tokens may form one character). So each row's sum is kept as far as the
    target covers the source's characters: weight on characters without a target token, such as the prompt's, is
    dropped. A token with an empty span gives and gets 0, whatever its weight, NaN included.

    Args:
        weights: (B,K) float, of either sign.
        source: (B,K,2) int64, [first, end) of each token's characters in the row's text; (0, 0) for special tokens
            and pads. Spans may overlap.
        target: (B,T,2) int64, likewise, in the same text.

    Returns:
        (B,T) in the dtype of `weights`, summed in float64. Non-negative weights give non-negative ones. Where the
        spans are the same, none is empty and none overlap, it is `weights`.

    Raises:
        DataError: shapes that do not match, or a span that begins before 0 or ends before it begins.
    """
    _check(weights, source, target)
    rows, size = len(weights), _size(source, target)
    sources, targets = _characters(source, size), _characters(target, size)
    # float64: the rounding of thousands of characters' float32 parts would add up to 1e-5 of the sum
    parts = weights.reshape(-1).double()[sources.token] / sources.width
    density = weights.new_zeros(rows * size, dtype=torch.float64).index_add_(0, sources.character, parts)
    covers = torch.bincount(targets.character, minlength=rows * size)
    shares = density[targets.character] / covers[targets.character]
    result = weights.new_zeros(rows * target.shape[1], dtype=torch.float64).index_add_(0, targets.token, shares)
    return result.reshape(rows, -1).to(weights.dtype)


def _size(*spans: Tensor) -> int:
    """Return the length of a text that holds all `spans` (B,N,2)."""
    return max([int(s.max()) for s in spans if s.numel()], default=0)


def _characters(spans: Tensor, size: int) -> _Characters:
    """Return every pair of a token and one of its characters of `spans` (B,N,2) in texts of `size` characters."""
    first, end = spans.reshape(-1, 2).unbind(dim=1)
    width = end - first
    token = torch.arange(len(width), device=spans.device).repeat_interleave(width)
    within = torch.arange(len(token), device=spans.device) - (width.cumsum(dim=0) - width)[token]
    row = token // max(1, spans.shape[1])
    return _Characters(token, row * size + first[token] + within, width[token])


def _check(weights: Tensor, source: Tensor, target: Tensor) -> None:
    if weights.dim() != 2 or not weights.is_floating_point():
        raise DataError(
            "weights",
            f"{weights.dtype} {tuple(weights.shape)}",
            "a float tensor (B,K)",
            "Pass one weight a source token.",
        )
    rows, tokens = weights.shape
    for name, spans, shape in (("source", source, (rows, tokens, 2)), ("target", target, (rows, "T", 2))):
        got = tuple(spans.shape)
        matches = len(got) == 3 and all(want in ("T", size) for size, want in zip(got, shape, strict=True))
        if not matches or spans.dtype != torch.int64:
            expected = f"int64 of shape ({', '.join(map(str, shape))})"
            raise DataError(name, f"{spans.dtype} {got}", expected, "Spans follow the weights (B,K).")
        invalid = (spans[..., 0] < 0) | (spans[..., 1] < spans[..., 0])
        if invalid.any():
            row, token = (int(i) for i in invalid.nonzero()[0])
            fix = "A span is [first, end) in characters; (0, 0) is a token without any."
            raise DataError(f"{name}[{row},{token}]", spans[row, token].tolist(), "0 <= first <= end", fix)
