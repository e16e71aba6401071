"""Fuzz targets: inputs of the data readers, the configuration parser and the offset mapping, and their properties.

Each target samples one input and checks it; only an ApportionError may be raised. `tests/faults/test_fuzz.py` runs a
few examples of each, `benchmarks.fuzz` as many as some minutes allow.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import tiny_tokenizers
import torch
import yaml
from hypothesis import strategies as st
from transformers import AutoTokenizer

from apportion.cli.arguments import parse, show
from apportion.config import DiagnoseConfig, EvaluateConfig, RewardConfig, RLConfig
from apportion.data import BadRows, cache_dir, labelled, prompts, read_rows
from apportion.errors import ApportionError, ConfigError
from apportion.models.text.render import encode, render
from apportion.models.text.token_spans import PolicyText
from apportion.models.text.transfer import transfer
from apportion.stages.method import build_method
from apportion.system import safe_yaml

# --- bytes: anything, valid tables, and valid tables that were damaged

CELL = st.one_of(
    st.text(max_size=12),
    st.sampled_from(["", " ", "1", "pos", '"', '""', ",", "\n", "\r\n", "\ufeff", "text", "null", "\x1a", "\u2028"]),
)
JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.sampled_from(["role", "content", "text", "x"]), inner, max_size=3),
    ),
    max_leaves=6,
)
NAMES = st.sampled_from(["text", "label", "prompt", "messages", "Text", "x", ""])
SCRAPS = [
    "{", "}", "[", "]", ":", ",", '"', "\\", "\\ud800", "\\u0000", "NaN", "-Infinity", "1e999", "9" * 5000, "null",
    '"text"', '"label"', '"prompt": ', "\n", "\r", "\r\n", "\0", "\ufeff", "text,label\n", '"a\nb",1\n', "[" * 200, "é",
]  # fmt: skip
JUNK = [
    b"\xff",
    b"\xef\xbb\xbf",
    b"\x1f\x8b",
    b"PAR1",
    b"\xed\xa0\x80",
    b"\x00" * 9,
    b"\xfe\xff",
    b'"',
    b"\n",
    b"{" * 99,
]


@st.composite
def csv_bytes(draw: st.DrawFn) -> bytes:
    """A CSV file, valid or nearly so."""
    header = draw(st.sampled_from(["text,label", "prompt", "text", "label,text", ""]))
    right = draw(st.booleans())
    width = header.count(",") + 1
    size = {"min_size": width, "max_size": width} if right else {"min_size": 1, "max_size": 3}
    rows = draw(st.lists(st.lists(CELL, **size), max_size=6))
    quote = right or draw(st.booleans())
    lines = [",".join('"' + c.replace('"', '""') + '"' if quote else c for c in row) for row in rows]
    ending = draw(st.sampled_from(["\n", "\r\n", "\r"]))
    return ending.join([header, *lines]).encode("utf-8", "surrogatepass")


@st.composite
def json_bytes(draw: st.DrawFn) -> bytes:
    """JSON lines or a list, valid or nearly so, or fragments of JSON."""
    if draw(st.booleans()):
        finite = st.one_of(st.none(), st.integers(), st.text(max_size=8), st.lists(st.text(max_size=4), max_size=2))
        made = draw(st.lists(st.dictionaries(NAMES, finite, min_size=1, max_size=3), min_size=1, max_size=5))
        return "\n".join(json.dumps(row) for row in made).encode()
    if draw(st.booleans()):
        return "".join(draw(st.lists(st.sampled_from(SCRAPS), max_size=12))).encode("utf-8", "surrogatepass")
    rows = draw(st.lists(st.one_of(st.dictionaries(NAMES, JSON, max_size=3), JSON), max_size=5))
    if draw(st.booleans()):
        return json.dumps(rows).encode()
    return "\n".join(json.dumps(row) for row in rows).encode()


COLUMNS = st.one_of(
    st.lists(st.one_of(st.none(), st.text(max_size=6)), min_size=1, max_size=4).map(lambda v: (v, pyarrow.string())),
    st.lists(st.one_of(st.none(), st.integers(-(2**62), 2**62)), min_size=1, max_size=4).map(
        lambda v: (v, pyarrow.int64())
    ),
    st.lists(st.binary(max_size=4), min_size=1, max_size=4).map(lambda v: (v, pyarrow.binary())),
    st.lists(st.integers(-(2**45), 2**45), min_size=1, max_size=4).map(lambda v: (v, pyarrow.timestamp("s"))),
    st.lists(st.lists(st.text(max_size=3), max_size=2), min_size=1, max_size=4).map(
        lambda v: (v, pyarrow.list_(pyarrow.string()))
    ),
)


@st.composite
def parquet_bytes(draw: st.DrawFn) -> bytes:
    """A Parquet file of one or two columns of any kind, text that is no UTF-8 among them."""
    arrays, names = [], draw(st.lists(NAMES, min_size=1, max_size=2))
    for _ in names:
        values, kind = draw(COLUMNS)
        if kind == pyarrow.binary() and draw(st.booleans()):
            arrays.append(pyarrow.array(values, kind).view(pyarrow.string()))
        else:
            safe = [v.encode("utf-8", "replace").decode() if isinstance(v, str) else v for v in values]
            arrays.append(
                pyarrow.array(safe if kind == pyarrow.string() else values, kind, safe=False)
                if kind != pyarrow.list_(pyarrow.string())
                else pyarrow.array(clean(values), kind)
            )
    size = min(map(len, arrays))
    file = io.BytesIO()
    table = pyarrow.Table.from_arrays([array.slice(0, size) for array in arrays], names=names)
    pyarrow.parquet.write_table(table, file, compression=draw(st.sampled_from(["none", "snappy", "zstd"])))
    return file.getvalue()


def clean(values: Any) -> Any:
    """Return lists of texts without lone surrogates, which pyarrow does not take."""
    return [[text.encode("utf-8", "replace").decode() for text in row] for row in values]


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """`content` with some bytes changed, cut out, doubled or put in."""
    data = bytearray(content)
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(0, len(data)))
        size = draw(st.integers(0, 24))
        change = draw(st.sampled_from(["byte", "cut", "double", "put", "end"]))
        if change == "byte" and at < len(data):
            data[at] = draw(st.integers(0, 255))
        elif change == "cut":
            del data[at : at + size]
        elif change == "double":
            data[at:at] = data[at : at + size]
        elif change == "put":
            data[at:at] = draw(st.sampled_from(JUNK))
        elif change == "end":
            del data[at:]
    return bytes(data)


@st.composite
def arrow_bytes(draw: st.DrawFn) -> bytes:
    """The table of a Parquet file as an Arrow stream, or as a file with an index."""
    table = pyarrow.parquet.ParquetFile(io.BytesIO(draw(parquet_bytes()))).read()
    file = io.BytesIO()
    make = pyarrow.ipc.new_stream if draw(st.booleans()) else pyarrow.ipc.new_file
    with make(file, table.schema) as writer:
        writer.write_table(table)
    return file.getvalue()


MADE = {
    ".csv": csv_bytes(),
    ".jsonl": json_bytes(),
    ".json": json_bytes(),
    ".parquet": parquet_bytes(),
    ".tsv": csv_bytes().map(lambda content: content.replace(b",", b"\t")),
    ".arrow": arrow_bytes(),
    ".csv.gz": csv_bytes().map(gzip.compress),
    ".json.gz": json_bytes().map(gzip.compress),
}


@st.composite
def tables(draw: st.DrawFn) -> tuple[str, bytes]:
    """A file's suffix and its bytes."""
    suffix = draw(st.sampled_from(list(MADE)))
    if draw(st.booleans()):
        return suffix, draw(MADE[suffix])
    content = draw(
        st.one_of(MADE[suffix], st.sampled_from(list(MADE.values())).flatmap(lambda made: made), st.binary())
    )
    return suffix, draw(damaged(content))


def readers(data: st.DataObject) -> None:
    """Any bytes as any table: rows or a DataError; the first skipped row is the one that raises otherwise."""
    check_table(*data.draw(tables()))


def check_table(suffix: str, content: bytes) -> None:
    """Check the properties of one table."""
    handle, name = tempfile.mkstemp(suffix=suffix)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        for read in (
            lambda **more: read_rows(name, field="data", **more),
            lambda **more: labelled(name, **more),
            lambda **more: prompts(name, **more),
        ):
            strict = outcome(read)
            written: list[Any] = []
            bad = BadRows(written.extend)
            lenient = outcome(lambda read=read, bad=bad: read(bad=bad))
            bad.flush()
            json.dumps(written, ensure_ascii=False).encode()  # each can be logged
            assert bad.count == len(written)
            if not isinstance(strict, str):
                assert repr(lenient) == repr(strict) and not written  # repr: NaN is not equal to itself
            elif not isinstance(lenient, str):
                assert written and written[0]["why"] == strict and len(written) <= len(lenient)
    finally:
        os.unlink(name)


def outcome(read: Callable[[], Any]) -> Any:
    """Return the result of `read`, or the text of its ApportionError."""
    try:
        return read()
    except ApportionError as error:
        str(error).encode("utf-8", "backslashreplace")
        return str(error)


# --- settings

KINDS = {"rl": RLConfig, "reward": RewardConfig, "evaluate": EvaluateConfig, "diagnose": DiagnoseConfig}
KEYS = st.sampled_from([
    "steps", "policy", "optim", "lr", "optim.lr", "lora", "rank", "targets", "credit", "attention", "mix",
    "kl_penalty", "coef", "segments", "ngrams", "n", "advantages", "gae", "gamma", "loss", "ppo", "epochs",
    "sampling", "batch_size", "prompt_tokens", "samples_per_prompt", "scores", "clip", "compare", "methods",
    "excerpt_tokens", "skip_bad_rows", "seed", "class_path", "init_args", "config", "output", "__path__", "dtype",
    "data", "test_data", "<<", "", "~", "1", "a b",
])  # fmt: skip
WORDS = st.sampled_from([
    "1", "0", "-1", "0.5", "1e-4", ".nan", ".inf", "null", "~", "true", "yes", "abc", "grpo", "attention", "[]", "{}",
    "[attention, kl_penalty]", "{attention: {mix: 0.5}}", "{ngrams: {n: 3}}", "[4, 8]", "[8, 4]", "length", "eos",
    "2001-13-45", "!!python/name:os.system", "!!bool x", "!!timestamp x", "!!int x", "!!binary é", "&a [*a]", "*a",
    "&b 1", "0x_", "1:99", "9" * 5000, "[" * 60, '"', "'", "|", ">", "@", "`", "%", "- a", "a: b", "? a", "\t", "\0",
    "\ud800", "é", "float32", "all", "rl", "data.csv", "~nobody-here/x", "x" * 300, "!!set {a}", "!!omap [a: 1]",
    "!!pairs [a: 1]", "!!null x", "=", "<<", "1_000",
])  # fmt: skip
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=6), WORDS),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(KEYS, inner, max_size=3)),
    max_leaves=8,
)


PLAUSIBLE: dict[str, st.SearchStrategy[Any]] = {
    "steps": st.integers(1, 99),
    "excerpts": st.integers(1, 99),
    "policy": st.one_of(st.text(min_size=1, max_size=5), WORDS),
    "prompts": st.one_of(st.text(min_size=1, max_size=5), WORDS),
    "output": st.text(min_size=1, max_size=5),
    "seed": st.integers(0, 2**31),
    "skip_bad_rows": st.booleans(),
    "algorithm": st.sampled_from(["abc", "ppo", "grpo", "ma-ppo", "rloo"]),
    "credit": st.sampled_from(["sparse", ["attention", "kl_penalty"], {"attention": {"mix": 0.3}}, None, "uniform"]),
    "segments": st.sampled_from(["tokens", {"ngrams": {"n": 4}}, None, "sentences"]),
    "optim": st.fixed_dictionaries({}, optional={"lr": st.floats(1e-9, 1), "warmup": st.floats(0, 1)}),
    "lora": st.fixed_dictionaries({}, optional={"rank": st.integers(0, 9), "targets": st.sampled_from(["all", ["q"]])}),
    "sampling": st.fixed_dictionaries(
        {}, optional={"batch_size": st.sampled_from([8, 32]), "prompt_tokens": st.none()}
    ),
    "device": st.sampled_from(["cpu", "auto"]),
    "pad_token": st.one_of(st.none(), st.text(max_size=4)),
}


@st.composite
def plausible(draw: st.DrawFn, stage: str) -> dict[str, Any]:
    """Mostly valid settings of a stage."""
    known = KINDS[stage].model_fields
    chosen = {name: made for name, made in PLAUSIBLE.items() if name in known}
    return draw(st.fixed_dictionaries({}, optional=chosen))


@st.composite
def yaml_text(draw: st.DrawFn) -> str:
    """YAML of settings, or text that resembles it."""
    if draw(st.booleans()):
        return yaml.safe_dump(draw(st.dictionaries(KEYS, VALUES, max_size=5)), allow_unicode=True)
    lines = draw(st.lists(st.tuples(st.sampled_from(["", "  ", "- ", "\t"]), KEYS, WORDS), max_size=6))
    return "\n".join(f"{indent}{key}: {word}" for indent, key, word in lines)


def settings(data: st.DataObject) -> None:
    """Any YAML and any flags: settings or a ConfigError; printed settings parse to the same settings."""
    stage = data.draw(st.sampled_from(list(KINDS)))
    pairs = data.draw(st.lists(st.tuples(KEYS, st.one_of(WORDS, st.text(max_size=6))), max_size=3))
    text = data.draw(st.one_of(st.none(), yaml_text(), st.text(max_size=40)))
    if data.draw(st.booleans()):
        text = safe_yaml.dump(data.draw(plausible(stage)))
        pairs = pairs[:1] if data.draw(st.booleans()) else []
    check_settings(stage, text, pairs)


def check_settings(stage: str, text: str | None, pairs: list[tuple[str, str]]) -> None:
    """Check the properties of a configuration file and flags."""
    words = [word for key, value in pairs if key != "config" for word in (f"--{key}", value)]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "c.yaml"
        if text is not None:
            file.write_bytes(text.encode("utf-8", "surrogatepass"))
            words += ["--config", str(file)]
        if stage in ("rl", "diagnose"):
            words += ["--reward_model", "x"]
        if stage == "rl" and data_free(words):
            words += ["--fresh"]
        try:
            config = parse(KINDS[stage], stage, words).config
            if stage == "rl":
                build_method(config)
        except ConfigError as error:
            str(error).encode("utf-8", "backslashreplace")
            return
        shown = show(config)
        file.write_bytes(shown.encode("utf-8", "surrogatepass"))
        again = parse(KINDS[stage], stage, ["--config", str(file)]).config
        assert show(again) == shown


def data_free(words: list[str]) -> bool:
    """Whether no switch is among the words yet."""
    return not any(word.startswith("--fresh") for word in words)


# --- offsets


@cache
def tokenizers() -> dict[str, Any]:
    """Return the small tokenizers of every family, and the built-in model's where it is cached."""
    known = {name: make() for name, make in tiny_tokenizers.FAMILIES.items()}
    real = sorted(cache_dir().glob("smollm2-*/tokenizer.json"))
    return known | ({"smollm2": AutoTokenizer.from_pretrained(real[0].parent)} if real else {})


def offsets(data: st.DataObject) -> None:
    """Any text or ids through any two tokenizers: ordered spans that cover the text, and conserved amounts."""
    names = sorted(tokenizers())
    policy, reward = data.draw(st.sampled_from(names)), data.draw(st.sampled_from(names))
    size = len(tokenizers()[policy])
    ids = data.draw(
        st.one_of(st.lists(st.integers(0, size - 1), max_size=24), st.one_of(tiny_tokenizers.TEXTS, st.text()))
    )
    check_offsets(policy, reward, ids, data.draw(st.integers(0, 24)))


def check_offsets(policy: str, reward: str, source: str | list[int], cut: int) -> None:
    """Check a text, or arbitrary ids, cut into prompt and response."""
    reads = PolicyText(tokenizers()[policy])
    ids = source
    if isinstance(source, str):
        text = source.encode("utf-8", "replace").decode()  # tokenizers take no lone surrogates, and readers refuse them
        ids = reads.tokenizer(text, add_special_tokens=False)["input_ids"]
    prompt, response = list(ids[:cut]), list(ids[cut:])
    decoded = reads.decode_response(prompt, response)
    reach = 0
    for first, end in decoded.spans:
        assert 0 <= first <= end <= len(decoded.text)
        if first != end:
            assert first <= reach <= end, "in order, without gaps"
            reach = end
    assert reach == len(decoded.text), "they cover the text"
    reading = render(tokenizers()[reward], reads, prompt, response)
    encoded = encode(tokenizers()[reward], reading)
    conserved(encoded.spans, reading.spans, len(reading.text))


def conserved(source: list[tuple[int, int]], target: list[tuple[int, int]], length: int) -> None:
    """Check that `transfer` moves exactly the source's weight on the target's characters to the target."""
    weights = torch.linspace(-1.0, 2.0, max(1, len(source)))[None, : len(source)]
    have = torch.tensor(source, dtype=torch.int64).reshape(1, -1, 2)
    want = torch.tensor(target, dtype=torch.int64).reshape(1, -1, 2)
    got = transfer(weights, have, want)
    taken = torch.zeros(length, dtype=torch.bool)
    for first, end in target:
        taken[first:end] = True
    expected = sum(
        float(weight) * float(taken[first:end].double().mean())
        for weight, (first, end) in zip(weights[0], source, strict=True)
        if end > first
    )
    assert got.shape == (1, len(target)) and torch.isfinite(got).all()
    assert abs(float(got.double().sum()) - expected) <= 1e-5 * max(1.0, float(weights.abs().sum()))
    assert all(float(value) == 0.0 for value, (first, end) in zip(got[0], target, strict=True) if first == end)


TARGETS: dict[str, Callable[[st.DataObject], None]] = {"readers": readers, "settings": settings, "offsets": offsets}
