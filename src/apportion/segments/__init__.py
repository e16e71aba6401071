"""Segmenters, which define one action: rollouts -> (B,T) int64 ids from 0 along each row, -1 off the mask."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from apportion import registry
from apportion.segments._boundaries import check
from apportion.segments.entropy import entropy
from apportion.segments.ngrams import ngrams
from apportion.segments.parsed import parsed
from apportion.segments.perplexity import perplexity
from apportion.segments.random_ngrams import random_ngrams
from apportion.segments.sentences import sentences
from apportion.segments.tokens import tokens
from apportion.segments.turns import turns
from apportion.segments.whole_response import whole_response
from apportion.types import Segmenter

METHODS: Mapping[str, Callable[..., Segmenter]] = {
    f.__name__: f
    for f in (
        tokens,
        turns,
        ngrams,
        random_ngrams,
        parsed,
        perplexity,
        entropy,
        sentences,
        whole_response,
    )
}
__all__ = [
    "METHODS",
    "build",
    "check",
    "entropy",
    "find",
    "names",
    "ngrams",
    "parsed",
    "perplexity",
    "random_ngrams",
    "sentences",
    "tokens",
    "turns",
    "whole_response",
]


def names() -> tuple[str, ...]:
    """Return the built-in segmenters' names."""
    return tuple(METHODS)


def find(name: str) -> Callable[..., Segmenter]:
    """Return the segmenter factory of that name, or "package.module:function". Raises ConfigError."""
    return registry.find("segments", name, METHODS)


def build(specs: list[tuple[str, dict[str, Any]]]) -> Segmenter:
    """Return the segmenter of exactly one (name, keyword arguments) pair."""
    name, kwargs = registry.single("segments", specs)
    method: Segmenter = registry.check_method("segments", name, registry.call("segments", name, find(name), kwargs))
    return method
