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

from apportion.errors import ModelError
from apportion.evidence.reward import reward_evidence
from apportion.evidence.text_reward import translate
from apportion.models.reward import load_reward
from apportion.models.text.template import _aligned
from apportion.models.text.token_spans import PolicyText
from apportion.models.text.transfer import transfer


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return foreign_models.world(tmp_path_factory.mktemp("world"))


@pytest.mark.parametrize("name", ["chat", "encoder"])
def test_a_response_that_continues_a_turn_is_read_in_that_turn(world: Path, name: str) -> None:
    tokenizer = policy_text().tokenizer
    turns = [*CHAT, {"role": "assistant", "content": "Well,"}]
    prompt = tokenizer("<eos>user\nSay\n<eos>assistant\nWell,", add_special_tokens=False)["input_ids"]
    batch = tiny_runs.rollouts_of([prompt], [tokenizer(" a film!", add_special_tokens=False)["input_ids"]])
    reward = judge(world, name, conversations={tuple(prompt): turns})
    theirs = translate(reward, batch)
    question = CHAT[0]["content"]
    before = f"[INST] {question} [/INST] Well," if name == "chat" else f"{question}\nWell,"
    text = f"{before} a film!" + (" #" if name == "chat" else "")
    own = reward.tokenizer(text, add_special_tokens=name != "chat")["input_ids"]
    assert theirs.rollouts.response_ids.tolist() == [own]
    assert "".join(text[a:b] for a, b in theirs.target[0].tolist()) == " a film!"


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


@pytest.mark.parametrize(("template", "decoded"), [
    ("{% for m in messages %}{{ m.role }}{% endfor %}", "one that renders a response 0 times"),
    ("{% for m in messages %}{{ m.content }}{{ m.content }}{% endfor %}", "renders a response 2 times"),
    ("{{ raise_exception('no such role') }}", "no such role"),
    ("{% for m in messages %}{{ m.content | lower }}{% endfor %}", "renders a response 0 times"),
    ("{% for m in messages %}{{ m.content | replace('short', 'S') }}{% endfor %}", "one that changes a plain answer"),
    ("{% if '<think>' in messages[-1].content %}{{ messages[-1].content.split('</think>')[0] }}{% endif %}"
     "{% for m in messages %}{{ m.content.split('</think>')[-1] }}{% endfor %}", "moves an answer's <think> part out"),
])  # fmt: skip
def test_a_template_that_loses_answers_is_refused_before_anything_is_sampled(
    world: Path, tmp_path: Path, template: str, decoded: str
) -> None:
    shutil.copytree(world / "chat", tmp_path / "chat")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "chat")
    tokenizer.chat_template = template
    tokenizer.save_pretrained(tmp_path / "chat")
    with pytest.raises(ModelError, match=decoded):
        judge(tmp_path, "chat", conversations={(5, 6): CHAT})


MOVES = (
    "{% for m in messages %}[{{ m.role }}] {% if m.role == 'assistant' and '</think>' in m.content %}"
    "<think>{{ m.content.split('</think>')[0].split('<think>')[-1] }}</think>\n\n"
    "{{ m.content.split('</think>')[-1] | trim }}{% else %}{{ m.content }}{% endif %} #{% endfor %}"
)
EMPTY = (
    "{% for m in messages %}[{{ m.role }}] {% if m.role == 'assistant' %}<think>\n"
    "{{ m.content.split('</think>')[0].split('<think>')[-1] | trim if '</think>' in m.content }}\n</think>\n\n"
    "{{ m.content.split('</think>')[-1] | trim }}{% else %}{{ m.content }}{% endif %} #{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


@pytest.mark.parametrize(("template", "shown"), [
    (MOVES, "<think>so it is</think>\n\ngood."), (EMPTY, "<think>\nso it is\n</think>\n\ngood."),
])  # fmt: skip
def test_thoughts_that_a_template_moves_are_scored_as_it_renders_them(
    world: Path, tmp_path: Path, template: str, shown: str
) -> None:
    """As Qwen 3's does; credit goes to the characters that both have, and a note at load names it."""
    shutil.copytree(world / "chat", tmp_path / "chat")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "chat")
    tokenizer.chat_template = template
    tokenizer.save_pretrained(tmp_path / "chat")
    batch = batch_of([("hello", "so it is</think> good. ")], eos=False)
    prompt = tuple(tiny_runs.alone(batch, 0)[0])
    turns = [{"role": "user", "content": "Well?"}]
    reward = judge(tmp_path, "chat", conversations={prompt: turns})
    assert any("changes answers with <think>" in note for note in reward.notes)
    found = reward_evidence(reward, batch, BOTH)
    text = f"[user] Well? #[assistant] {shown} #"
    ids = reward.tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert float(found["scores"]) == pytest.approx(float(reward.model(ids).logits), abs=1e-5)
    theirs = translate(reward, batch)
    response = tiny_runs.alone(batch, 0)[1]
    spans = policy_text().decode_response(prompt, response).spans
    for (a, b), (first, end) in zip(spans, theirs.target[0].tolist(), strict=False):
        own = "so it is</think> good. "[a:b]
        assert text[first:end].strip() in (own.strip(), "") and (own.strip() == "" or end > first)


@pytest.mark.parametrize(("response", "shown", "places"), [
    ("abcdef", "abXXef", [(0, 1), (1, 2), (2, 3), (3, 4), (4, 5), (5, 6)]),  # in the place of others
    ("a-a-a", "a", [(0, 1), (1, 1), (1, 1), (1, 1), (1, 1)]),  # the leftmost of several
    ("xab", "ab!", [(0, 0), (0, 1), (1, 2)]),
    ("abcd", "abXcd", [(0, 1), (1, 2), (3, 4), (4, 5)]),
])  # fmt: skip
def test_characters_keep_their_order_and_stay_inside(response: str, shown: str, places: list[tuple[int, int]]) -> None:
    starts, ends = _aligned(response, shown)
    assert list(zip(starts, ends, strict=True)) == places


def test_a_response_that_was_cut_off_gets_no_end_of_turn(world: Path) -> None:
    """Where the policy ends its texts itself; with a fixed length every response is a whole turn."""
    batch = batch_of([("hello", "a film"), ("hello", "a story")], eos=False)
    batch = replace(batch, ended=torch.tensor([True, False]))
    prompt = tuple(tiny_runs.alone(batch, 0)[0])
    texts = ["[INST] Say: RESPONSE0RESPONSE [/INST] a film #", "[INST] Say: RESPONSE0RESPONSE [/INST] a story"]
    for cuts in (True, False):
        reward = judge(world, "chat", conversations={prompt: CHAT}, cuts=cuts)
        theirs = translate(reward, batch).rollouts
        for row, text in enumerate(texts):
            whole = text if row == 0 or cuts else f"{text} #"
            ids = reward.tokenizer(whole, add_special_tokens=False)["input_ids"]
            assert theirs.response_ids[row][theirs.mask[row]].tolist() == ids


def test_a_template_of_its_own_is_read_although_the_words_are_the_policys(world: Path, tmp_path: Path) -> None:
    """Its own rendering is what it scores, and it says so; a template that renders the same leaves the ids alone."""
    turns = [{"role": "user", "content": "A film?"}]
    policy = tiny.tokenizer()
    policy.chat_template = "<eos>Today.\n" + CHATML
    ids = policy.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    response = policy(" I rented it", add_special_tokens=False)["input_ids"]
    batch = tiny_runs.rollouts_of([ids], [[*response, tiny_runs.EOS]])
    for template, own in ((CHATML, True), ("<eos>Today.\n" + CHATML + "{# the same #}", False), (None, False)):
        shutil.copytree(world / "reward", tmp_path / "same", dirs_exist_ok=True)
        tokenizer = tiny.tokenizer()
        tokenizer.chat_template = template
        (tmp_path / "same" / "chat_template.jinja").unlink(missing_ok=True)
        tokenizer.save_pretrained(tmp_path / "same")
        text = PolicyText(policy, {tuple(ids): turns})
        reward = load_reward(str(tmp_path / "same"), device="cpu", policy=text)
        assert (reward.text is not None) == own == any("chat template of its own" in note for note in reward.notes)
        read = [*ids, *response, tiny_runs.EOS]
        if own:
            answered = [*turns, {"role": "assistant", "content": " I rented it"}]
            read = tokenizer(tokenizer.apply_chat_template(answered, tokenize=False), add_special_tokens=False)[
                "input_ids"
            ]
        with torch.no_grad():
            logits = reward.model(torch.tensor([read])).logits[0]
        found = reward_evidence(reward, batch, frozenset({"scores"}))["scores"]
        assert float(found) == pytest.approx(float(logits[1] - logits[0]), abs=1e-5)


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
