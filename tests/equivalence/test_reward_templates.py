"""Conversations through a reward model's own chat template: where the response stands, and what is refused."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import foreign_models
import pytest
import tiny
import tiny_runs
import torch
from foreign_models import (
    BOTH,
    CHAT,
    CHATML,
    batch_of,
    judge,
    logged,
    policy_text,
)
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from apportion.config import SamplingConfig
from apportion.errors import ModelError, ScoreError
from apportion.evidence.reward import reward_evidence
from apportion.evidence.text_reward import translate
from apportion.generation.prompts import conversations
from apportion.models.text.transfer import transfer


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return foreign_models.world(tmp_path_factory.mktemp("world"))


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
    found = reward_evidence(reward, batch, BOTH)
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
    ("{% for m in messages %}<{{ m.content.split('|')[-1] }}>{% endfor %}", "thought|decoded", "decoded"),
])  # fmt: skip
def test_what_a_template_trims_gets_nothing(world: Path, template: str, response: str, shown: str) -> None:
    reward = judge(world, "chat")
    reward.tokenizer.chat_template = template
    batch = batch_of([("hello", response)])
    prompt = tuple(tiny_runs.alone(batch, 0)[0])
    reward = replace(reward, text=replace(policy_text(), conversations={prompt: CHAT}))
    theirs = translate(reward, batch)
    found = transfer(torch.ones(theirs.source.shape[:2]), theirs.source, theirs.target)[0]
    skipped = response.index(shown) if shown else len(response)
    given = policy_text().decode_response([], tiny_runs.alone(batch, 0)[1]).spans
    for value, (a, b) in zip(found.tolist(), given, strict=False):
        assert (value > 0) == (b > skipped and a < skipped + len(shown) and b > a)


@pytest.mark.parametrize(("template", "error", "decoded"), [
    ("{% for m in messages %}{{ m.role }}{% endfor %}", ModelError, "one that renders a response 0 times"),
    ("{% for m in messages %}{{ m.content }}{{ m.content }}{% endfor %}", ModelError, "renders a response 2 times"),
    ("{{ raise_exception('no such role') }}", ModelError, "no such role"),
    ("{% for m in messages %}{{ m.content | replace('film', 'FILM') }}{% endfor %}", ScoreError,
     "response of rollout 1: got 'a film'; expected a response that the reward model's chat template renders"),
    ("{% for m in messages %}{{ m.content.split('-')[0] }}{% endfor %}", ScoreError, "rollout 0: got 'a-a-a'"),
])  # fmt: skip
def test_a_response_whose_place_is_not_certain_is_refused(
    world: Path, template: str, error: type[Exception], decoded: str
) -> None:
    reward = judge(world, "chat")
    reward.tokenizer.chat_template = template
    batch = batch_of([("hello", "a-a-a" if "split" in template else "a b"), ("hello", "a film")], eos=False)
    prompt = tuple(tiny_runs.alone(batch, 0)[0])
    with pytest.raises(error, match=decoded):
        translate(replace(reward, text=replace(policy_text(), conversations={prompt: CHAT})), batch)


def test_a_conversation_that_is_cut_is_a_text() -> None:
    texts, rows = ["plain", CHAT], [[5, 6], [7, 8]]
    assert conversations(texts, rows, SamplingConfig(prompt_tokens=None)) == {(7, 8): CHAT}
    assert conversations(texts, rows, SamplingConfig(prompt_tokens=[1, 2])) == {}


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
        decoded = chatty.decode(record["response_ids"], skip_special_tokens=True)
        ids = tokenizer(f"[INST] A film? [/INST] {decoded} #", add_special_tokens=False, return_tensors="pt")
        with torch.no_grad():
            assert record["raw_score"] == pytest.approx(float(reward(**ids).logits), abs=1e-5)
    assert len({record["raw_score"] for record in records}) > 4
