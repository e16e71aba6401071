"""Where tokens stand in their decoded text: every family of tokenizer, any Unicode, ids that no text encodes to."""

from __future__ import annotations

from functools import cache

import pytest
import tiny
import tiny_tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tiny_tokenizers import FAMILIES, TEXTS
from tokenizers import pre_tokenizers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from apportion.models.text import token_spans
from apportion.models.text.token_spans import BROKEN, PolicyText, TokenText, group_spans, spans_after


@cache
def policy(name: str) -> PolicyText:
    return PolicyText(ByT5Tokenizer() if name == "slow bytes" else FAMILIES[name]())


def decoded(reads: PolicyText, ids: list[int]) -> str:
    kept = [i for i in ids if i not in reads.special]
    return reads.tokenizer.decode(kept, clean_up_tokenization_spaces=False)


def check(reads: PolicyText, prompt: list[int], response: list[int]) -> TokenText:
    """Check what must hold of any ids, and return what was found."""
    found = reads.decode_response(prompt, response)
    assert found.before + found.text == decoded(reads, prompt + response)
    assert len(found.spans) == len(response)
    reach = 0
    full = [(first, end) for first, end in found.spans if first != end]
    for (first, end), (before, _) in zip(full, [(0, 0), *full], strict=False):
        assert before <= first <= reach <= end, "in order, without gaps"
        reach = end
    assert reach == len(found.text), "they cover the text"
    assert all(0 <= first <= end <= reach for first, end in found.spans)
    for i, (first, end) in zip(response, found.spans, strict=True):
        assert first == end or i not in reads.special
    return found


@given(text=TEXTS, cut=st.integers(0, 40))
@pytest.mark.parametrize("name", [*FAMILIES, "slow bytes"])
def test_spans_of_any_text_are_in_order_and_cover_it(name: str, text: str, cut: int) -> None:
    reads = policy(name)
    ids = reads.tokenizer(text, add_special_tokens=False)["input_ids"]
    check(reads, ids[:cut], ids[cut:])


@given(ids=st.lists(st.integers(0, 375), max_size=24), cut=st.integers(0, 24))
@pytest.mark.parametrize("name", [*FAMILIES, "slow bytes"])
def test_spans_of_any_ids_are_in_order_and_cover_their_text(name: str, ids: list[int], cut: int) -> None:
    """What a policy samples need not be the encoding of any text, nor whole characters, nor known tokens."""
    reads = policy(name)
    ids = [i for i in ids if name != "slow bytes" or i < len(reads.tokenizer)]
    check(reads, ids[:cut], ids[cut:])


@given(ids=st.lists(st.integers(0, 375), max_size=24), cut=st.integers(0, 24))
@pytest.mark.parametrize("name", FAMILIES)
def test_a_few_tokens_at_a_time_cover_what_whole_prefixes_do(name: str, ids: list[int], cut: int) -> None:
    reads = policy(name)
    kept = [i for i in ids if i not in reads.special]
    prompt, response = kept[:cut], kept[cut:]
    whole, start, found = spans_after(reads._decode, prompt, response)
    if response:
        prefixes = [reads._decode(prompt + response[: n + 1]) for n in range(len(response))]
        exact = group_spans(prefixes, start)
        text_only = [(a, b) for a, b in exact if BROKEN not in whole[a:b] and b > a]
        assert all(span in found for span in text_only)


def byte_of() -> dict[str, int]:
    """Return which byte each letter of a byte-level token stands for."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    letters = {chr(b): b for b in printable} | {chr(256 + n): b for n, b in enumerate(others)}
    assert sorted(letters) == sorted(pre_tokenizers.ByteLevel.alphabet())
    return letters


BYTES = byte_of()


@given(text=TEXTS.map(lambda text: text.replace("<eos>", "").replace(BROKEN, "")), cut=st.integers(0, 30))
def test_byte_level_spans_are_those_of_the_bytes(text: str, cut: int) -> None:
    """Each token's bytes are known, so its characters are: from that of its first byte to that of its last."""
    reads = policy("byte-level")
    ids = reads.tokenizer(text, add_special_tokens=False)["input_ids"]
    prompt, response = ids[:cut], ids[cut:]
    character = [n for n, letter in enumerate(text) for _ in letter.encode()]
    sizes = [len([BYTES[c] for c in reads.tokenizer.convert_ids_to_tokens(i)]) for i in ids]
    found = check(reads, prompt, response)
    at = sum(sizes[: len(prompt)])
    start = character[at] if response else len(text)
    assert (found.before, found.text) == (text[:start], text[start:])
    for size, span in zip(sizes[len(prompt) :], found.spans, strict=True):
        assert span == (character[at] - start, character[at + size - 1] + 1 - start)
        at += size


def spans_of(tokenizer: PreTrainedTokenizerFast, tokens: list[str]) -> tuple[str, list[tuple[int, int]]]:
    found = check(PolicyText(tokenizer), [], tokenizer.convert_tokens_to_ids(tokens))
    return found.text, found.spans


def test_byte_tokens_of_one_character_share_it() -> None:
    emoji = ["<0xF0>", "<0x9F>", "<0x98>", "<0x80>"]
    fallback = tiny_tokenizers.byte_fallback()
    assert spans_of(fallback, ["▁", "a", *emoji, "▁", "b"]) == (
        "a😀 b", [(0, 0), (0, 1), *[(1, 2)] * 4, (2, 3), (3, 4)],
    )  # fmt: skip
    assert spans_of(fallback, [*emoji, *emoji]) == ("😀😀", [(0, 1)] * 4 + [(1, 2)] * 4)
    byte_level = tiny.tokenizer()
    letters = {b: c for c, b in BYTES.items()}
    ids = [letters[b] for b in "😀".encode()]
    assert spans_of(byte_level, ["a", *ids, "b"]) == ("a😀b", [(0, 1), *[(1, 2)] * 4, (2, 3)])
    # cut off in the middle of it: what there is of the character is one broken one, which its tokens share
    assert spans_of(byte_level, ["a", *ids[:3]]) == (f"a{BROKEN}", [(0, 1), *[(1, 2)] * 3])
    assert spans_of(byte_level, ["a", *ids[:2], "b"])[0] == f"a{BROKEN}b"


def test_special_tokens_have_no_characters() -> None:
    tokenizer = tiny.tokenizer()
    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    a, b = tokenizer("ab", add_special_tokens=False)["input_ids"]
    assert check(PolicyText(tokenizer), [], [a, pad, b, eos]) == ("", "ab", [(0, 1), (1, 1), (1, 2), (2, 2)])
    assert check(PolicyText(tokenizer), [a, b], [eos]) == ("ab", "", [(0, 0)])
    assert check(PolicyText(tokenizer), [], []) == ("", "", [])


def test_the_first_word_of_a_response_keeps_its_blank() -> None:
    """Decoded alone, a decoder that strips the first blank would join it to the prompt."""
    tokenizer = tiny_tokenizers.byte_fallback()
    prompt, response = (tokenizer.convert_tokens_to_ids(["▁", letter]) for letter in "ab")
    assert tokenizer.decode(response) == "b"
    assert check(PolicyText(tokenizer), prompt, response) == ("a", " b", [(0, 1), (1, 2)])


def test_a_decoder_that_looks_far_back_decodes_whole_prefixes() -> None:
    """Two tokens at a time would give the fourth one's character to the third; the pieces then are not the text."""
    texts = {(): "", (1,): "a", (1, 2): "ab", (1, 2, 3): "abcc", (1, 2, 3, 4): "abccd"}
    texts |= {(2,): "b", (2, 3): "bccc", (3,): "cc", (3, 4): "cc"}
    found = spans_after(lambda ids: texts[tuple(ids)], [], [1, 2, 3, 4])
    assert found == ("abccd", 0, [(0, 1), (1, 2), (2, 4), (4, 5)])


def test_few_tokens_are_decoded_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """300 tokens of text: the whole once or twice, and then a handful of tokens for each."""
    reads = policy("byte-level")
    ids = reads.tokenizer(" ".join(tiny.TEXTS) + " naïve 😀 中文", add_special_tokens=False)["input_ids"] * 4
    seen: list[int] = []
    real = PolicyText._decode

    def counted(self: PolicyText, some: list[int]) -> str:
        seen.append(len(some))
        return real(self, some)

    monkeypatch.setattr(token_spans.PolicyText, "_decode", counted)
    check(reads, ids[:50], ids[50:])
    assert len(ids) > 300 and sum(seen) < 8 * len(ids)
