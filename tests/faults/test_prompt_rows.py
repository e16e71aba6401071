"""Rows of prompts that a run cannot use as they are: refused by name, left out and listed, and what the doctor says."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

Command = Callable[..., Any]
STRICT = (
    "{% for m in messages %}{% if m.role in ('user', 'assistant') %}<unk>{{ m.role }}\n{{ m.content }}<eos>\n"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<unk>assistant\n{% endif %}"
)
COLUMNS = """
def give(texts, rollouts, prompts, answer, **columns):
    assert set(columns) == {"messages", "x"}
    assert all(turns[0]["content"] in prompt for turns, prompt in zip(columns["messages"], prompts))
    return [float(value) for value in answer]
"""


@pytest.fixture
def flags(tiny: ModuleType, tmp_path: Path, rl_flags: list[str]) -> list[str]:
    """Return the flags of a run on conversations in p.jsonl, whose policy's template knows two roles."""
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = STRICT
    model = tiny.save_policy(tmp_path / "policy")
    tokenizer.save_pretrained(model)
    changes = ("--policy", model, "--prompts", "p.jsonl", "--sampling.prompt_tokens", "null")
    return [*rl_flags, *map(str, changes)]


def rows(folder: Path, *conversations: list[dict[str, Any]]) -> None:
    table = [{"messages": turns, "answer": str(i), "x": None} for i, turns in enumerate(conversations)]
    (folder / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in table))


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def test_a_turn_that_the_template_drops_is_refused_by_both(
    model_command: Command, tmp_path: Path, flags: list[str]
) -> None:
    rows(tmp_path, [user("a film")], [{"role": "developer", "content": "in rhyme"}, user("a story")])
    pieces = ("p.jsonl, line 2: turn 1 (role 'developer')", "drops the text 'in rhyme'")
    model_command("rl", *flags).assert_refused("prompts: got", *pieces, "give the turn a role that it shows")
    done = model_command("doctor", *flags, "--fast", "--json")
    (found,) = [one for one in json.loads(done.out)["findings"] if one["name"] == "prompts"]
    assert found["level"] == "fail" and all(piece in found["message"] for piece in pieces)


def test_rows_that_do_not_fit_are_left_out_and_the_others_columns_reach_the_function(
    model_command: Command, tmp_path: Path, flags: list[str]
) -> None:
    (tmp_path / "mine.py").write_text(COLUMNS)
    fine = [[user(f"film {i}")] for i in range(6)]
    lost, long = [user("a cast"), {"role": "tool", "content": "minus"}], [user("film" + " film" * 200)]
    rows(tmp_path, *fine[:2], lost, *fine[2:4], long, *fine[4:])
    credit = ("--credit", "[{process: {function: 'mine:give'}}]", "--compare", "[]", "--skip_bad_rows")
    done = model_command("rl", *flags, *credit, PYTHONPATH=str(tmp_path))
    done.assert_done()
    assert "2 bad rows left out" in done.err
    listed = [json.loads(line) for line in (tmp_path / "run" / "bad_rows.jsonl").read_text().splitlines()]
    assert [row["where"] for row in listed] == ["p.jsonl, line 3", "p.jsonl, line 6"]
    assert "'minus'" in listed[0]["why"] and "1 to 124 tokens" in listed[1]["why"]
    answers = {"film 0": 0, "film 1": 1, "film 2": 3, "film 3": 4, "film 4": 6, "film 5": 7}
    records = [json.loads(line) for line in (tmp_path / "run" / "rollouts.jsonl").read_text().splitlines()]
    for record in records:
        (answer,) = (value for text, value in answers.items() if text in record["prompt"])
        assert record["credit"] == [0, 0, 0, answer]
    doctor = json.loads(model_command("doctor", *flags, "--fast", "--json", "--skip_bad_rows").out)
    (found,) = [one for one in doctor["findings"] if one["name"] == "prompts"]
    assert found["level"] == "warn" and "6 prompts" in found["message"] and "2 rows skipped" in found["message"]


def test_a_prompt_with_a_token_that_the_policy_has_no_embedding_for(
    model_command: Command, tiny: ModuleType, tmp_path: Path, flags: list[str]
) -> None:
    """A tokenizer may have more tokens than the model; the prompt that uses one is named, or left out."""
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = STRICT
    tokenizer.add_tokens(["<image>"])
    tokenizer.save_pretrained(tmp_path / "policy")
    rows(tmp_path, [user("a film")], [user("a <image> story")], [user("a cast")])
    done = model_command("rl", *flags)
    done.assert_refused("prompts: got \"'<image>' (400) in prompts that the policy cannot read: 1 of 3: prompt 2",
                        "p.jsonl, line 2", "400 embeddings", "skip_bad_rows: true")  # fmt: skip
    done = model_command("rl", *flags, "--skip_bad_rows", "--fresh")
    done.assert_done()
    assert "1 bad row left out" in done.err


def test_a_function_that_cannot_be_called_is_known_before_the_models(
    model_command: Command, tmp_path: Path, flags: list[str]
) -> None:
    (tmp_path / "mine.py").write_text("def give(completions, **columns):\n    return [0.0 for _ in completions]\n")
    rows(tmp_path, [user("a film")])
    credit = ("--credit", "[{process: {function: 'mine:give'}}]")
    done = model_command("rl", *flags, *credit, PYTHONPATH=str(tmp_path))
    done.assert_refused("mine:give: got '(completions, columns)'", "a function of (texts, rollouts, prompts)")


def test_a_column_that_a_function_needs_is_known_before_the_models(
    model_command: Command, tmp_path: Path, flags: list[str]
) -> None:
    (tmp_path / "mine.py").write_text(
        "def give(texts, rollouts, prompts, solution):\n    return [0.0 for _ in texts]\n"
    )
    rows(tmp_path, [user("a film")])
    credit = ("--credit", "[{process: {function: 'mine:give'}}]")
    done = model_command("rl", *flags, *credit, PYTHONPATH=str(tmp_path))
    done.assert_refused("prompts: got \"no column 'solution'\"", "the columns that mine:give takes", "a default")
    doctor = model_command("doctor", *flags, *credit, "--fast", "--json", PYTHONPATH=str(tmp_path))
    (found,) = [one for one in json.loads(doctor.out)["findings"] if one["name"] == "prompts"]
    assert found["level"] == "fail" and "no column 'solution'" in found["message"]


def test_diagnose_and_evaluate_check_prompts_alike(model_command: Command, tmp_path: Path, flags: list[str]) -> None:
    """Text prompts fit; in a conversation a turn is lost: the same message from each command."""
    rows(tmp_path, [user("a film")], [user("a story"), {"role": "tool", "content": "minus"}], [user("a cast")])
    models = [word for name in ("--policy", "--reward_model", "--prompts") for word in flags_of(flags, name)]
    whole = ("--sampling.prompt_tokens", "null", "--count", 2, "--samples", 2, "--sampling.batch_size", 4)
    small = ("--sampling.max_new_tokens", 3, "--methods", "[sparse]", "--output", "diagnosis", "--device", "cpu")
    lost = ("p.jsonl, line 2: turn 2 (role 'tool')", "'minus'")
    model_command("diagnose", *models, *whole, *small).assert_refused("prompts: got", *lost)
    done = model_command("diagnose", *models, *whole, *small, "--fresh", "--skip_bad_rows")
    done.assert_done()
    assert json.loads((tmp_path / "diagnosis" / "diagnosis.json").read_text())["prompts"] == 2


def flags_of(flags: list[str], name: str) -> tuple[str, str]:
    """Return a flag and its last value."""
    at = len(flags) - 1 - flags[::-1].index(name)
    return flags[at], flags[at + 1]
