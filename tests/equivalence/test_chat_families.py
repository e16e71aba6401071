"""Conversations over templates of the most used families: each text arrives, or is refused by role and row."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_runs
from chat_templates import TEMPLATES
from transformers import AutoModelForCausalLM

from apportion.config import DiagnoseConfig, SamplingConfig
from apportion.data import labelled
from apportion.data.prompts import read_prompts
from apportion.errors import ApportionError, DataError, ModelError
from apportion.generation.prompts import encode_prompts
from apportion.models.text.labelled import chat_renderer
from apportion.models.text.render import render
from apportion.models.text.template import check_template
from apportion.models.text.token_spans import PolicyText
from apportion.stages.diagnose.diagnose import open_models
from apportion.stages.doctor.rl import check_rl

Turns = list[dict[str, Any]]
FUNCTION = {"name": "weather", "description": "knows of storms", "parameters": {"type": "object"}}
TOOL = {"type": "function", "function": FUNCTION}


def turn(role: str, content: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def calling(content: Any, **more: Any) -> dict[str, Any]:
    call = {"id": "abcdefghi", "type": "function"}
    call |= {"function": {"name": "weather", "arguments": {"town": "Brenwick"}}}
    return {"role": "assistant", "tool_calls": [call], **({} if content is ... else {"content": content}), **more}


ASK, REPLY, MORE = turn("user", "plomvit wants"), turn("assistant", "grelsk answers"), turn("user", "dranfo again")
RESULT = turn("tool", "minus vrelt degrees", name="weather", tool_call_id="abcdefghi")
CASES: dict[str, Turns] = {
    "user": [ASK],
    "white space around": [turn("user", "\n  plomvit wants \n")],
    "user, assistant, user": [ASK, REPLY, MORE],
    "system": [turn("system", "be zuntly"), ASK],
    "developer": [turn("developer", "be zuntly"), ASK],
    "system and developer": [turn("system", "be zuntly"), turn("developer", "harmle it"), ASK],
    "later system": [ASK, REPLY, turn("system", "be zuntly"), MORE],
    "empty system": [turn("system", ""), ASK],
    "two users": [ASK, MORE],
    "human": [turn("human", "plomvit wants")],
    "function": [ASK, turn("function", "minus vrelt degrees", name="weather")],
    "tool result": [ASK, calling(""), RESULT],
    "tool result, null": [ASK, calling(None), RESULT],
    "tool result, absent": [ASK, calling(...), RESULT],
    "tool result, text beside the call": [ASK, calling("skurvo first"), RESULT],
    "tool result, question after": [ASK, calling(""), RESULT, turn("assistant", "grelsk answers"), MORE],
    "tools": [ASK],
    "parts": [turn("user", [{"type": "text", "text": "plomvit wants"}, {"type": "text", "text": " qualdo too"}])],
    "system, then parts": [turn("system", "be zuntly"), turn("user", [{"type": "text", "text": "plomvit wants"}])],
    "thoughts of an earlier answer": [ASK, turn("assistant", "<think>\nhmm\n</think>\n\ngrelsk answers"), MORE],
    "prefilled": [ASK, turn("assistant", "grelsk beg")],
}
TOOLS = {name for name in CASES if name.startswith("tool")}  # whose rows have the column tools
CALLS = TOOLS - {"tools"}
OTHERS = {"developer", "function", "human", "system and developer"}  # roles that no template of before 2025 knows
TURNS = {"developer", "human", "later system", "system and developer", "two users"}  # against strict alternation
SYSTEM = {"system", "empty system", "system, then parts"}
# what each template has no place for; everything else has to arrive
REFUSED: dict[str, set[str]] = {
    "llama 2": TURNS | CALLS | {"function"},
    "llama 3": CALLS,
    "llama 3.1": {"tool result, text beside the call"},
    "mistral 0.1, mixtral": TURNS | CALLS | SYSTEM | {"function"},
    "mistral 0.3, tools": TURNS | {"function", "tool result, text beside the call"},
    "gemma 2": TURNS | CALLS | SYSTEM,
    "gemma 3": TURNS | CALLS,
    "qwen 2.5": OTHERS,
    "qwen 3": OTHERS,
    "phi 3": OTHERS | CALLS,
    "phi 4": OTHERS | CALLS,
    "chatml, smollm2": CALLS,
    "deepseek": OTHERS,
    "zephyr": OTHERS | CALLS,
    "cohere": TURNS | CALLS | {"function"},
    "gpt-oss, harmony": {"function", "human", "later system", "system and developer"},
}
# and with an answer behind the turns: alternation counts the answer too, and Mistral's shows a system text only where
# the last turn is the user's
ANSWERED = {
    "gemma 2": {"function"},
    "gemma 3": {"function"},
    "mistral 0.3, tools": {"system", "system, then parts"},
}


def templated(name: str) -> Any:
    made = tiny.tokenizer()
    made.add_special_tokens({"bos_token": "<s>"})
    made.chat_template = TEMPLATES[name]
    return made


def pieces(turns: Turns) -> Iterator[tuple[str, str]]:
    """Yield (role, text) of everything that has to be seen; thoughts of assistants need not."""
    for turn in turns:
        content = turn.get("content") or ""
        texts = [content] if isinstance(content, str) else [part["text"] for part in content]
        for text in texts:
            text = text.split("</think>")[-1].strip()
            if text:
                yield turn["role"], text
        for call in turn.get("tool_calls", []):
            yield turn["role"], call["function"]["name"]


def row(case: str, turns: Turns, column: str = "messages", **more: Any) -> dict[str, Any]:
    return {column: turns, **({"tools": [TOOL]} if case in TOOLS else {}), **more}


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(one) + "\n" for one in rows))
    return path


def error_of(call: Callable[[], Any], kind: type[ApportionError] = DataError) -> ApportionError | None:
    """Return the error that `call` raises, None without any."""
    try:
        call()
    except kind as error:
        return error
    return None


def refused(call: Callable[[], Any], turns: Turns, where: str) -> bool:
    """Whether a case is refused: by an error that names the row and the role, or all roles of the conversation."""
    error = error_of(call)
    if error is None:
        return False
    text = str(error)
    assert where in text and error.fix and "has no attribute" not in text, text
    check_named(text, r"turn (?P<turn>\d+) \(role '(?P<role>\w+)'\)", turns)
    return True


def check_named(text: str, pattern: str, turns: Turns) -> None:
    """Check that an error names the turn that is lost, or the roles of all that the template refused."""
    roles = [turn["role"] for turn in turns]
    named = re.search(pattern, text)
    if named is None:
        assert f"roles {', '.join(roles)} (" in text, text
    else:
        assert roles[int(named["turn"]) - 1] == named["role"], text


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_text_of_a_prompt_arrives_or_is_refused(name: str, tmp_path: Path) -> None:
    tokenizer = templated(name)
    lost = set()
    for case, turns in CASES.items():
        rows = [row(case, [turn("user", "an ordinary one")]), row(case, turns)]
        file = write(tmp_path / "p.jsonl", rows)
        prompts = read_prompts(str(file))
        found, hidden = list[str](), list[str]()

        def encode(prompts: Any = prompts, found: list[str] = found, hidden: list[str] = hidden) -> None:
            sampling = SamplingConfig(prompt_tokens=None, max_prompt_tokens=4000)
            made = encode_prompts(prompts, tokenizer, sampling, 0, 1 << 20)
            found += [tokenizer.decode(ids) for ids in made.rows]
            hidden += made.hidden

        if refused(encode, turns, "p.jsonl, line 2"):
            lost.add(case)
            continue
        for role, text in pieces(turns):
            assert text in found[1], f"{case}: {role}'s {text!r} is not in {found[1]!r}"
        if case == "prefilled":
            assert found[1].endswith("grelsk beg"), found[1]
        if case in TOOLS:  # shown, or listed with the row for the run's own warning
            listed = [one for one in hidden if "p.jsonl, line 2: the tool 'weather'" in one]
            assert ("knows of storms" in found[1]) != bool(listed), f"{case}: {found[1]!r}, {hidden}"
        if case in CALLS:
            listed = [one for one in hidden if "p.jsonl, line 2: the argument 'Brenwick'" in one]
            assert ("Brenwick" in found[1]) != bool(listed), f"{case}: {found[1]!r}, {hidden}"
    assert lost == REFUSED[name], sorted(lost ^ REFUSED[name])


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_text_of_labelled_ones_and_pairs_arrives_or_is_refused(name: str, tmp_path: Path) -> None:
    """As for prompts: the same conversations are refused, and the answer stands behind the rest."""
    tokenizer = templated(name)
    lost = set()
    for case, turns in CASES.items():
        if turns[-1]["role"] == "assistant":
            continue
        good, bad = [*turns, turn("assistant", "flondry good")], [*turns, turn("assistant", "smerk bad")]
        kinds = {
            "messages": [row(case, good, label=1), row(case, bad, label=0)],
            "pairs": [row(case, good, "chosen", rejected=bad)],
            "prompt and completion": [row(case, turns, "prompt", completion=good[-1:], label=1)],
        }
        outcomes = set()
        for kind, rows in kinds.items():
            file = write(tmp_path / "l.jsonl", rows)
            found: list[Any] = []

            def read(file: Path = file, found: list[Any] = found) -> None:
                found += labelled(str(file), render=chat_renderer(lambda: tokenizer), pairs=True)

            outcomes.add(refused(read, good, "l.jsonl, line 1"))
            for one, answer in zip(found, ("flondry good", "smerk bad"), strict=False):
                before, after = one.text[: one.prompt], one.text[one.prompt :]
                assert after.startswith(answer), f"{kind}, {case}: {after!r}"
                for role, text in pieces(turns):
                    assert text in before, f"{kind}, {case}: {role}'s {text!r} is not in {before!r}"
        assert len(outcomes) == 1, f"{case}: refused in one form only"
        if outcomes == {True}:
            lost.add(case)
    expected = REFUSED[name] | ANSWERED.get(name, set())
    assert lost == expected, sorted(lost ^ expected)


THOUGHTFUL = "<think>\nhmm\n</think>\n\nflondry good"


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_labelled_answer_that_thinks_first(name: str, tmp_path: Path) -> None:
    """Shown whole, in the template's own spacing, or without its thoughts; the prompt is the conversation before it."""
    tokenizer = templated(name)
    file = write(tmp_path / "l.jsonl", [row("", [ASK, turn("assistant", THOUGHTFUL)], label=1)])
    (one,) = labelled(str(file), render=chat_renderer(lambda: tokenizer))
    before, after = one.text[: one.prompt], one.text[one.prompt :]
    assert ASK["content"] in before and "think" not in before and "flondry good" not in before
    assert after.lstrip().startswith("flondry good" if name == "deepseek" else THOUGHTFUL), after


# any role, text and tool call
PERMISSIVE = (
    "{% for m in messages %}[{{ m.role }}]{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content "
    "or [] %}{{ p.text }}{% endfor %}{% endif %}{% for c in m.tool_calls or [] %}<{{ c.function.name }}>{% endfor %};"
    "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_reward_model_with_this_template_sees_every_turn_or_is_refused(name: str, tmp_path: Path) -> None:
    own, policy = templated(name), templated(name)
    policy.chat_template = PERMISSIVE
    response = policy(" flondry good", add_special_tokens=False)["input_ids"]
    lost = set()
    for case, turns in CASES.items():
        prompts = read_prompts(str(write(tmp_path / "p.jsonl", [row(case, turns)])))
        found = encode_prompts(prompts, policy, SamplingConfig(prompt_tokens=None), 0, 1 << 20)
        text = PolicyText(policy, found.conversations)
        error = error_of(lambda text=text: check_template("reward_model", own, text), ModelError)
        if error is not None:
            if case != "prefilled":
                check_named(str(error), r"role '(?P<role>\w+)', turn (?P<turn>\d+)", turns)
            lost.add(case)
            continue
        shown = render(own, text, found.rows[0], response).text
        for role, one in [*pieces(turns), ("assistant", "flondry good")]:
            assert one in shown, f"{case}: {role}'s {one!r} is not in {shown!r}"
    # thoughts behind a begun answer would be cut out of it
    moved = {"prefilled"} if name in ("qwen 3", "deepseek") else set()
    expected = REFUSED[name] | ANSWERED.get(name, set()) | moved
    assert lost == expected, sorted(lost ^ expected)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_runs.world(tmp_path_factory.mktemp("world"))


@pytest.mark.parametrize("name", TEMPLATES)
def test_doctor_and_diagnose_say_the_same(name: str, world: Path, tmp_path: Path) -> None:
    """A file of all that arrives is read by both; a row behind them that loses a turn is named by both."""
    shutil.copytree(world / "policy", tmp_path / "policy")
    tokenizer = templated(name)
    policy = AutoModelForCausalLM.from_pretrained(tmp_path / "policy")
    policy.resize_token_embeddings(len(tokenizer))  # for the tokens that the template adds
    policy.config.max_position_embeddings = 8000
    policy.save_pretrained(tmp_path / "policy")
    tokenizer.save_pretrained(tmp_path / "policy")
    kept = [case for case in CASES if case not in REFUSED[name]]
    bad = sorted(REFUSED[name])[0]
    size = {"sampling.prompt_tokens": "null", "sampling.max_prompt_tokens": 4000, "credit": "sparse"}

    def both(cases: list[str]) -> tuple[Any, Callable[[], list[list[int]]]]:
        file = write(tmp_path / "p.jsonl", [row(case, CASES[case]) for case in cases])
        config = tiny_runs.config(world, policy=tmp_path / "policy", prompts=file, **size)
        names = {"policy": str(tmp_path / "policy"), "reward_model": str(world / "reward"), "prompts": str(file)}
        diagnosed = DiagnoseConfig(**names, output=str(tmp_path / "out"), sampling=config.sampling, dtype="float32")
        found = next(one for one in check_rl(config, fast=True) if one.name == "prompts")
        return found, lambda: open_models(diagnosed, {})[1]

    finding, rows = both(kept)
    assert finding.level == "ok", finding.message
    for case, ids in zip(kept, rows(), strict=True):
        assert all(text in tokenizer.decode(ids) for _, text in pieces(CASES[case]))
    finding, rows = both([*kept, bad])
    with pytest.raises(DataError) as caught:
        rows()
    assert finding.level == "fail"
    for text in (finding.message, str(caught.value)):
        assert f"p.jsonl, line {len(kept) + 1}" in text and "role" in text, text
