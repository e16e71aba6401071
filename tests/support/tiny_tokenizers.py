"""Small tokenizers of every family, trained on the spot: byte-level, byte fallback, WordPiece, Unigram, normalising."""

from __future__ import annotations

import json

import tiny
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<pad>", "<eos>", "<unk>"]
# family with skin tone, flag, keycap, combining marks (composed and not), right to left, ligature, width, Hangul jamo
PIECES = [
    "a", "film", " great", "Film.", "  ", " ", "\n", "\n\n", "\t", "\x00", "<eos>", "##s", "▁", "\ufffd", "\u200d",
    "😀", "👩🏽\u200d👩\u200d👧", "🇨🇭", "1️⃣", "é", "e\u0301", "n\u0303o", "שלום", "مرحبا", "ﬁ", "Ａ", "½", "ß", "İ",
    "중", "\u1112\u1161", "中文",
]  # fmt: skip
TEXTS = st.lists(st.one_of(st.sampled_from(PIECES), st.text(max_size=4)), max_size=12).map("".join)


def byte_fallback() -> PreTrainedTokenizerFast:
    """Return one as Llama 2 has: words begin with ▁, and unknown characters become tokens of one byte each."""
    bpe = Tokenizer(models.BPE(unk_token="<unk>"))
    bpe.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    bpe.train_from_iterator(tiny.TEXTS, trainers.BpeTrainer(vocab_size=120, special_tokens=SPECIAL))
    settings = json.loads(bpe.to_str())
    vocabulary = settings["model"]["vocab"]
    for byte in range(256):
        vocabulary[f"<0x{byte:02X}>"] = len(vocabulary)
    settings["model"] |= {"byte_fallback": True, "fuse_unk": True}
    bpe = Tokenizer.from_str(json.dumps(settings))
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    bpe.decoder = decoders.Sequence(parts)
    return wrapped(bpe)


def wordpiece() -> PreTrainedTokenizerFast:
    """Return one as BERT has: lower case, no accents, [CLS] and [SEP] around every text."""
    bert = Tokenizer(models.WordPiece(unk_token="<unk>"))
    bert.normalizer = normalizers.BertNormalizer(lowercase=True, strip_accents=True)
    bert.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    bert.decoder = decoders.WordPiece(cleanup=False)
    special = [*SPECIAL, "[CLS]", "[SEP]"]
    bert.train_from_iterator(tiny.TEXTS, trainers.WordPieceTrainer(vocab_size=200, special_tokens=special))
    ids = [(token, bert.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    bert.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ids)
    return wrapped(bert, cls_token="[CLS]", sep_token="[SEP]")


def unigram() -> PreTrainedTokenizerFast:
    """Return one as T5 has: NFKC, words begin with ▁, pieces by likelihood."""
    pieces = Tokenizer(models.Unigram())
    pieces.normalizer = normalizers.NFKC()
    pieces.pre_tokenizer = pre_tokenizers.Metaspace()
    pieces.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=150, special_tokens=SPECIAL, unk_token="<unk>")
    pieces.train_from_iterator(tiny.TEXTS, trainer)
    return wrapped(pieces)


def trimming() -> PreTrainedTokenizerFast:
    """Return a byte-level one that normalises (NFKC, lower case) and leaves blanks out of its offsets, as RoBERTa."""
    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=330, special_tokens=SPECIAL, initial_alphabet=alphabet)
    bpe.train_from_iterator(tiny.TEXTS, trainer)
    bpe.post_processor = processors.ByteLevel(trim_offsets=True)
    return wrapped(bpe)


def wrapped(tokenizer: Tokenizer, **more: str) -> PreTrainedTokenizerFast:
    """Return `tokenizer` as transformers knows it."""
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", **more
    )


FAMILIES = {
    "byte-level": tiny.tokenizer,
    "byte fallback": byte_fallback,
    "wordpiece": wordpiece,
    "unigram": unigram,
    "trimming": trimming,
}
