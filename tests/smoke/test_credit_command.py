"""`apportion credit` on tiny decoders and encoders: every number recomputed, nothing given to what is not the text."""

from __future__ import annotations

import io
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    ModernBertConfig,
    PreTrainedTokenizerFast,
)

from apportion.cli.main import main

TEXT, PROMPT = "a great story, well told", "I rented this film because"


def bert_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer that puts [CLS] and [SEP] around every text."""
    tokens = tiny.tokenizer()
    tokens.add_special_tokens({"cls_token": "[CLS]", "sep_token": "[SEP]"})
    special = [("[CLS]", tokens.cls_token_id), ("[SEP]", tokens.sep_token_id)]
    tokens.backend_tokenizer.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=special)
    return tokens


def save_bert(folder: Path) -> Path:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    torch.manual_seed(3)
    names = {"id2label": {0: "negative", 1: "positive"}}
    config = BertConfig(vocab_size=420, pad_token_id=0, initializer_range=0.3, **names, **sizes)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    bert_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    tiny.save_reward(folder / "decoder")
    tiny.save_reward(folder / "one-label", labels=1)
    save_bert(folder / "encoder")
    appending = tiny.tokenizer()
    appending.backend_tokenizer.post_processor = TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", 1)])
    appending.save_pretrained(tiny.save_reward(folder / "appending", seed=4, labels=1))
    return folder


def found(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    """Run the command in this process with --json and return its one object."""
    capsys.readouterr()
    assert main(["credit", *map(str, arguments), "--json"]) == 0
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    return json.loads(out)


@torch.no_grad()
def by_hand(folder: Path, text: str, prompt: str) -> tuple[float, list[float]]:
    """Return (R, attention of the position that is scored over the text's tokens) by eager attention, head by head."""
    model = AutoModelForSequenceClassification.from_pretrained(folder, attn_implementation="eager").eval()
    tokens = AutoTokenizer.from_pretrained(folder)
    before, after = (tokens(t, add_special_tokens=False)["input_ids"] if t else [] for t in (prompt, text))
    encoder = tokens.cls_token_id is not None
    ends = [1] if "appending" in str(folder) else []
    ids = [tokens.cls_token_id, *before, *after, tokens.sep_token_id] if encoder else [*before, *after, *ends]
    first = len(before) + (1 if encoder else 0)
    out = model(torch.tensor([ids]), output_attentions=True)
    rows = [out.attentions[-1][0, h, 0 if encoder else -1] for h in range(4)]
    mean = sum(rows) / 4
    logits = out.logits[0]
    return float(logits[1] - logits[0] if len(logits) == 2 else logits[0]), mean[first : first + len(after)].tolist()


@pytest.mark.parametrize("prompt", ["", PROMPT])
@pytest.mark.parametrize("name", ["decoder", "one-label", "encoder"])
def test_score_and_credit_are_the_models_own(
    world: Path, capsys: pytest.CaptureFixture[str], name: str, prompt: str
) -> None:
    """Prompt and special tokens are read by the model and get nothing; the text's tokens share the whole score."""
    flags = ["--prompt", prompt] if prompt else []
    got = found(capsys, "--model", world / name, "--text", TEXT, *flags)
    score, attention = by_hand(world / name, TEXT, prompt)
    assert got["score"] == pytest.approx(score, abs=1e-5) and got["prompt"] == prompt
    assert "".join(got["tokens"]) == TEXT and len(got["ids"]) == len(got["tokens"])
    assert set(got["methods"]) == {"attention", "uniform", "sparse"}
    for values in got["methods"].values():
        assert len(values) == len(got["tokens"])
        assert sum(values) == pytest.approx(got["score"], abs=1e-5 * max(1, abs(score)))
    kept = sum(attention)
    assert got["kept_mass"] == pytest.approx(kept, abs=1e-5) and (kept < 0.999 or (name != "encoder" and not prompt))
    expected = [0.8 * a / kept * score for a in attention]
    expected[-1] += 0.2 * score
    assert got["methods"]["attention"] == pytest.approx(expected, abs=1e-5)
    assert got["methods"]["sparse"] == pytest.approx([0.0] * (len(attention) - 1) + [score], abs=1e-5)
    assert got["methods"]["uniform"] == pytest.approx([score / len(attention)] * len(attention), abs=1e-5)


def test_the_prompt_is_read_though_it_gets_nothing(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--model", world / "decoder", "--text", TEXT]
    alone, after = found(capsys, *flags), found(capsys, *flags, "--prompt", PROMPT)
    assert alone["ids"] == after["ids"] and abs(alone["score"] - after["score"]) > 1e-3


@pytest.mark.parametrize("prompt", ["[CLS] A story", "[SEP]", ""])
@pytest.mark.parametrize("text", ["[CLS] a great story", "[SEP] told [SEP] [CLS]", "great"])
def test_special_tokens_in_the_text_itself_do_not_move_the_credit(
    world: Path, capsys: pytest.CaptureFixture[str], text: str, prompt: str
) -> None:
    """A text may begin with the very token that the tokenizer puts before it."""
    flags = ["--prompt", prompt] if prompt else []
    got = found(capsys, "--model", world / "encoder", "--text", text, *flags, "--method", "{attention: {mix: 1.0}}")
    score, attention = by_hand(world / "encoder", text, prompt)
    expected = [a / sum(attention) * score for a in attention]
    assert got["methods"]["attention"] == pytest.approx(expected, abs=1e-5)
    assert got["ids"] == bert_tokenizer()(text, add_special_tokens=False)["input_ids"]


def test_methods_take_settings(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = "[{attention: {mix: 1.0, exclude_self: true}}, sparse]"
    got = found(capsys, "--model", world / "decoder", "--text", TEXT, "--method", spec)
    assert set(got["methods"]) == {"attention", "sparse"} and got["methods"]["attention"][-1] == 0.0
    assert sum(got["methods"]["attention"]) == pytest.approx(got["score"], abs=1e-5)


def test_methods_that_read_more_than_attention(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Prefix scores are those of the text cut short; every method's credit sums to the score."""
    spec = "[prefix_difference, attribution, {shapley: {spans: 3}}]"
    flags = ["--model", world / "decoder", "--prompt", PROMPT, "--text", TEXT, "--method", spec]
    got = found(capsys, *flags)
    assert set(got["methods"]) == {"prefix_difference", "attribution", "shapley"}
    for values in got["methods"].values():
        assert sum(values) == pytest.approx(got["score"], abs=1e-4 * max(1, abs(got["score"])))
    tokenizer = AutoTokenizer.from_pretrained(world / "decoder")
    model = AutoModelForSequenceClassification.from_pretrained(world / "decoder").eval()
    before = tokenizer(PROMPT, add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        logits = [model(torch.tensor([before + got["ids"][:n]])).logits[0] for n in range(1, len(got["ids"]) + 1)]
    scores = [float(row[1] - row[0]) for row in logits]
    moves = [scores[0], *(b - a for a, b in itertools.pairwise(scores))]
    assert got["methods"]["prefix_difference"] == pytest.approx(moves, abs=1e-4)


LISTS = ("[sparse]", "[sparse, attention]", "[sparse, attention, prefix_difference]", "[sparse, attribution]",
         "[prefix_difference, {shapley: {spans: 3}}]")  # fmt: skip


@pytest.mark.parametrize("methods", LISTS)
@pytest.mark.parametrize("name", ["encoder", "appending"])
def test_special_tokens_are_read_by_every_method(
    world: Path, capsys: pytest.CaptureFixture[str], name: str, methods: str
) -> None:
    """[CLS] and [SEP], or an EOS that the tokenizer appends: every list of methods shares out the printed score."""
    folder = world / name
    got = found(capsys, "--model", folder, "--text", TEXT, "--prompt", PROMPT, "--method", methods)
    score, _ = by_hand(folder, TEXT, PROMPT)
    assert got["score"] == pytest.approx(score, abs=1e-5)
    for values in got["methods"].values():
        assert sum(values) == pytest.approx(score, abs=1e-4 * max(1, abs(score)))


@torch.no_grad()
@pytest.mark.parametrize("name", ["encoder", "appending"])
def test_a_prefix_has_the_special_tokens_of_a_text(world: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    got = found(capsys, "--model", world / name, "--text", TEXT, "--method", "prefix_difference")
    model = AutoModelForSequenceClassification.from_pretrained(world / name).eval()
    tokens = AutoTokenizer.from_pretrained(world / name)
    ids = tokens("a")["input_ids"]
    start = ids.index(tokens("a", add_special_tokens=False)["input_ids"][0])
    texts = [[*ids[:start], *got["ids"][:n], *ids[start + 1 :]] for n in range(1, len(got["ids"]) + 1)]
    logits = [model(torch.tensor([one])).logits[0].tolist() for one in texts]
    scores = [row[-1] - (row[0] if len(row) == 2 else 0.0) for row in logits]
    moves = [scores[0], *(b - a for a, b in itertools.pairwise(scores))]
    assert got["methods"]["prefix_difference"] == pytest.approx(moves, abs=1e-4)


def test_a_pooled_score_is_given_without_attention(
    world: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Attention is refused by name where a method needs it, and left out with one line where it is only shown."""
    edges = {"cls_token_id": 2, "sep_token_id": 1, "bos_token_id": 2, "eos_token_id": 1}
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = ModernBertConfig(vocab_size=400, pad_token_id=0, num_labels=1, classifier_pooling="mean", **sizes, **edges)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    got = found(capsys, "--model", tmp_path, "--text", TEXT, "--method", "[sparse, prefix_difference]")
    assert got["kept_mass"] is None and sum(got["methods"]["prefix_difference"]) == pytest.approx(
        got["score"], abs=1e-5
    )
    for flags in ([], ["--method", "sparse"]):
        assert main(["credit", "--model", str(tmp_path), "--text", TEXT, *flags]) == (0 if flags else 2)
        message = capsys.readouterr().err
        assert "reward_attention" in message and "pooled over positions" in message and "Traceback" not in message


def test_labels_without_a_meaning_are_asked_about(
    world: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    folder = tiny.save_reward(tmp_path)
    settings = json.loads((folder / "config.json").read_text())
    for names in (["LABEL_0", "LABEL_1"], ["clean", "toxic"]):
        settings |= {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
        (folder / "config.json").write_text(json.dumps(settings))
        code = main(["credit", "--model", str(folder), "--text", TEXT, "--method", "sparse"])
        message = " ".join(capsys.readouterr().err.split())
        assert code == (0 if "LABEL_0" in names else 2) and "--positive_label" in message
    scores = [found(capsys, "--model", folder, "--text", TEXT, "--positive_label", name)["score"] for name in names]
    assert scores[0] == pytest.approx(-scores[1])


@pytest.mark.parametrize(
    "text", ["x", "naïve café 😀 — 中文", "line\nline\n\nlast", "  spaces  kept  ", "<pad> inside"]
)
def test_odd_texts_keep_their_score(world: Path, capsys: pytest.CaptureFixture[str], text: str) -> None:
    got = found(capsys, "--model", world / "decoder", "--text", text)
    assert all(abs(sum(v) - got["score"]) <= 1e-5 * max(1, abs(got["score"])) for v in got["methods"].values())
    assert got["ids"] == tiny.tokenizer()(text)["input_ids"]


@pytest.mark.parametrize("text", ["great <pad>", "great<pad><pad>"])
def test_a_text_that_ends_with_the_models_pad_is_refused(
    world: Path, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    """The model would read its score before the pad: credit from another position would be a silent error."""
    assert main(["credit", "--model", str(world / "decoder"), "--text", text, "--json"]) == 2
    message = capsys.readouterr().err
    assert "pad" in message and "expected" in message and "Traceback" not in message


def test_a_text_without_any_token_is_refused(world: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """A tokenizer may drop characters, here every control character."""
    from tokenizers import normalizers

    folder = save_bert(tmp_path / "dropping")
    tokens = bert_tokenizer()
    tokens.backend_tokenizer.normalizer = normalizers.Replace("\x07", "")
    tokens.save_pretrained(folder)
    assert main(["credit", "--model", str(folder), "--text", "\x07\x07"]) == 2
    message = capsys.readouterr().err
    assert "--text" in message and "token" in message and "Traceback" not in message


def test_text_from_standard_input(
    world: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{TEXT}\n"))
    piped = found(capsys, "--model", world / "decoder", "--text", "-")
    assert piped == found(capsys, "--model", world / "decoder", "--text", TEXT), "the shell's newline is no token"


def test_the_page_shows_every_token_and_method(world: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    page = tmp_path / "out" / "credit.html"
    page.parent.mkdir()
    text = "a <b>great</b> story & more"
    got = found(capsys, "--model", world / "decoder", "--text", text, "--prompt", PROMPT, "--html", page)
    html = page.read_text(encoding="utf-8")
    assert html.lstrip().lower().startswith("<!doctype html") and "<b>great" not in html
    assert all(method in html for method in got["methods"]) and PROMPT in html
    assert 'src="http' not in html and 'href="http' not in html, "the page needs the network"


def test_the_table_names_the_score_and_the_strongest_tokens(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    got = found(capsys, "--model", world / "decoder", "--text", TEXT)
    assert main(["credit", "--model", str(world / "decoder"), "--text", TEXT]) == 0
    out = capsys.readouterr().out
    assert f"score {got['score']:+.3f}" in out and f"{len(got['tokens'])} tokens" in out
    values = got["methods"]["attention"]
    best = max(range(len(values)), key=lambda i: abs(values[i]))
    assert f"{got['tokens'][best]!r} {values[best]:+.3f}" in out


def test_the_command_as_a_process_reads_a_pipe(world: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "apportion", "credit", "--model", world / "encoder", "--text", "-", "--json"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        list(map(str, command)), cwd=tmp_path, env=environment, input=TEXT, capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stderr) == (0, "")
    got = json.loads(done.stdout)
    assert "".join(got["tokens"]) == TEXT
    assert sum(got["methods"]["attention"]) == pytest.approx(got["score"], abs=1e-5)
