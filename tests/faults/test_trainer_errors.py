"""Bad demonstrations, pairs and settings of sft and dpo: one message with its fix, before any weights are loaded."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import trainer_runs
from trainer_runs import assistant, user

Command = Callable[..., Any]
TALK = [user("How?"), assistant("Fine.")]
CALLED = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {}}}]}
GOOD = {"sft": {"prompt": "How?", "completion": " Fine."}, "dpo": {"prompt": "How?", "chosen": " a", "rejected": " b"}}


@pytest.fixture(scope="module")
def trainer_world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trainer_runs.world(tmp_path_factory.mktemp("world"))


DEMONSTRATIONS: list[tuple[str, dict[str, Any], list[str]]] = [
    ("no known column", {"review": "A film."}, ["columns review", "--text_column"]),
    ("a null prompt", {"prompt": None, "completion": "x"}, ["prompt = None", "a value in column 'prompt'"]),
    ("an empty completion", {"prompt": "x", "completion": " "}, ["completion = ' '"]),
    ("a number", {"text": 5}, ["text = 5 (int)", "Write it as a string"]),
    ("a list of texts", {"prompt": "x", "completion": ["a", "b"]}, ["completion = ['a', 'b'] (list)"]),
    ("two kinds", {"prompt": "x", "completion": TALK[1:]}, ["prompt = text, completion = messages", "one kind"]),
    ("the user at the end", {"messages": [user("How?")]}, ["role 'user'", "a conversation that ends with an answer"]),
    ("a system turn at the end", {"messages": [*TALK, {"role": "system", "content": "x"}]}, ["role 'system'"]),
    ("a turn without role", {"messages": [{"content": "x"}]}, ["a list of messages, each with its role"]),
    ("a turn of null", {"messages": [user("x"), {"role": "assistant", "content": None}]}, ["messages[1]", "content"]),
    ("an image", {"messages": [user([{"type": "image"}]), TALK[1]]}, ["type = 'image'"]),  # type: ignore[arg-type]
    ("messages as text", {"messages": "How?"}, ["a list of messages"]),
    ("a tool call that is not shown", {"messages": [TALK[0], CALLED]}, ["the tool call 'f'"]),
    ("tools that are none", {"messages": TALK, "tools": "f"}, ["a list of JSON schemas"]),
    ("half a character", {"text": "\ud800"}, ["a lone surrogate"]),
]
RANKED = {"prompt": "x", "completions": ["a", "b"], "ranks": [1, 2]}
PAIRS: list[tuple[str, dict[str, Any], list[str]]] = [
    ("no known column", {"text": "A film."}, ["columns text", "'chosen' and 'rejected'"]),
    ("no rejected", {"prompt": "x", "chosen": "y"}, ["a column 'rejected'"]),
    ("a null chosen", {"prompt": "x", "chosen": None, "rejected": "y"}, ["chosen = None"]),
    ("equal texts", {"prompt": "x", "chosen": "y", "rejected": "y"}, ["1 pairs, all of two equal texts"]),
    ("two prompts", {"chosen": "My cat.", "rejected": "A dog."}, ["two answers to one prompt", "--skip_bad_rows"]),
    (
        "conversations of two prompts",
        {"chosen": TALK, "rejected": [user("Why?"), assistant("No.")]},
        ["two answers to one conversation"],
    ),
    (
        "the user at the end",
        {"prompt": TALK, "chosen": [user("And?")], "rejected": [user("Or?")]},
        ["role 'user'", "ends with an answer"],
    ),
    ("two kinds", {"prompt": "x", "chosen": TALK[1:], "rejected": TALK[1:]}, ["prompt = text, answers = messages"]),
    (
        "several turns behind a prompt",
        {"prompt": TALK[:1], "chosen": [TALK[1], *TALK], "rejected": TALK[1:]},
        ["one turn, the answer"],
    ),
    ("a list of texts", {"prompt": "x", "chosen": ["a"], "rejected": ["b"]}, ["chosen = ['a'] (list)"]),
    (
        "ranks as text",
        {"prompt": "x", "completions": ["a", "b"], "ranks": ["1", "2"]},
        ["ranks[0] = '1'", "without quotes"],
    ),
    ("a rank too few", {"prompt": "x", "completions": ["a", "b"], "ranks": [1]}, ["1 ranks of 2 completions"]),
    ("no ranks", {"prompt": "x", "completions": ["a", "b"]}, ["a column 'ranks'"]),
    ("null ranks", {"prompt": "x", "completions": ["a", "b"], "ranks": None}, ["ranks = None"]),
    ("one completion", {"prompt": "x", "completions": ["a"], "ranks": [1]}, ["1 completion'", "two or more"]),
    ("a null completion", {"prompt": "x", "completions": ["a", None], "ranks": [1, 2]}, ["completions[1]"]),
    ("equal completions", {"prompt": "x", "completions": ["a", "a"], "ranks": [1, 2]}, ["1 and 2 are equal"]),
    ("all ties", {"prompt": "x", "completions": ["a", "b"], "ranks": [1, 1]}, ["no usable row"]),
    ("an annotator that is a list", {**RANKED, "annotator": ["a"]}, ["annotator = ['a'] (list)"]),
    ("an answered prompt", {**RANKED, "prompt": TALK}, ["the last turn of the prompt is the assistant's"]),
    ("a ranking without prompt", {"completions": ["a", "b"], "ranks": [1, 2]}, ["a column 'prompt'"]),
]


@pytest.mark.parametrize(
    ("stage", "row", "pieces"),
    [
        pytest.param(stage, row, pieces, id=f"{stage}, {name}")
        for stage, cases in (("sft", DEMONSTRATIONS), ("dpo", PAIRS))
        for name, row, pieces in cases
    ],
)
def test_a_bad_row_is_named(
    model_command: Command, trainer_world: Path, tmp_path: Path, stage: str, row: dict[str, Any], pieces: list[str]
) -> None:
    trainer_runs.write(tmp_path / "rows.jsonl", [row])
    done = model_command(stage, *trainer_runs.flags(trainer_world, "rows.jsonl", "run"))
    warnings = "".join(line for line in done.err.splitlines(keepends=True) if line.startswith("warning:"))
    done.assert_refused("data: got", *pieces, before=warnings)
    assert not (tmp_path / "run" / "final").exists() and "Loading" not in done.err


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_bad_rows_are_left_out_on_request(
    model_command: Command, trainer_world: Path, tmp_path: Path, stage: str
) -> None:
    bad = [row for name, row, _ in (DEMONSTRATIONS if stage == "sft" else PAIRS) if name in ("a null prompt", "a null chosen", "two kinds", "half a character")]  # fmt: skip  # noqa: E501
    rows = [{**GOOD[stage], "prompt": f"How {i}?"} for i in range(8)] + bad
    trainer_runs.write(tmp_path / "rows.jsonl", rows)
    done = model_command(stage, *trainer_runs.flags(trainer_world, "rows.jsonl", "run"), "--skip_bad_rows")
    done.assert_done()
    listed = [json.loads(line) for line in (tmp_path / "run" / "bad_rows.jsonl").read_text().splitlines()]
    assert len(listed) == len(bad) and {one["setting"] for one in listed} == {"data"}
    assert f"{len(bad)} bad row" in done.err and "rows.jsonl, line 9" in listed[0]["where"]


def test_null_cells_and_list_columns_of_parquet(model_command: Command, trainer_world: Path, tmp_path: Path) -> None:
    """Arrow gives every turn the keys of all others, null where they are absent."""
    rows = [
        {"messages": [user("a"), {**assistant("b"), "name": None}]},
        {"messages": [{**user("c"), "name": "x"}, assistant("d")]},
    ]
    table = pyarrow.table({"prompt": ["x", None], "completion": [["a"], ["b"]]})
    pyarrow.parquet.write_table(table, tmp_path / "bad.parquet")
    done = model_command("sft", *trainer_runs.flags(trainer_world, "bad.parquet", "bad"))
    done.assert_refused("bad.parquet, row 1: completion = ['a'] (list)", "Write it as a string")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows * 4), tmp_path / "good.parquet")
    model_command("sft", *trainer_runs.flags(trainer_world, "good.parquet", "good")).assert_done()


@pytest.mark.parametrize(
    ("stage", "flags", "pieces"),
    [
        ("dpo", ["--data", "x.jsonl", "--loss", "hinge"], ["loss: got 'hinge'", "one of sigmoid, ipo"]),
        ("dpo", ["--data", "x.jsonl", "--beta", "0"], ["beta: got 0"]),
        ("dpo", ["--data", "x.jsonl", "--label_smoothing", "0.5"], ["label_smoothing: got 0.5", "[0, 0.5)"]),
        ("dpo", [], ["data: got ''", "preference pairs or rankings", "--data pairs.jsonl"]),
        ("sft", ["--overlong", "cut"], ["overlong: got 'cut'"]),
        ("sft", ["--max_length", "1"], ["max_length: got 1"]),
        ("sft", ["--optim.moments", "bfloat16"], ["--optim.moments"]),
        ("sft", ["--held_out", "2"], ["held_out: got 2"]),
    ],
)
def test_settings_are_refused_before_any_library_is_loaded(
    command: Command, stage: str, flags: list[str], pieces: list[str]
) -> None:
    command(stage, *flags).assert_refused_early(*pieces)


@pytest.mark.parametrize(
    ("stage", "changes", "pieces"),
    [
        ("sft", {"max_length": 500}, ["max_length: got 500", "context of 128 tokens"]),
        ("sft", {"max_length": 6}, ["30 of 30 rows are longer than 6 tokens", "--overlong truncate"]),
        ("dpo", {"max_length": 3, "overlong": "truncate"}, ["tokens before the answer", "--overlong drop"]),
        ("dpo", {"loss": "ipo", "label_smoothing": 0.1}, ["label_smoothing: got 0.1", "0 with loss ipo"]),
        ("sft", {"test_split": "test"}, ["test_split: got 'test'", "null without test_data"]),
        ("sft", {"chat_template_kwargs": "{thinking: true}"}, ["chat_template_kwargs: got 'thinking'"]),
        ("dpo", {"lora.targets": "nothing"}, ["lora.targets: got 'nothing'", "q_proj"]),
        ("dpo", {"model": "./absent"}, ["model: got './absent'"]),
        ("sft", {"data": "absent.jsonl"}, ["data: got 'absent.jsonl'"]),
        ("sft", {"data": "imdb", "split": "test"}, ["imdb with split 'test'"]),
    ],
)
def test_what_the_model_and_the_data_refuse(
    model_command: Command, trainer_world: Path, stage: str, changes: dict[str, Any], pieces: list[str]
) -> None:
    data = trainer_world / ("demonstrations.jsonl" if stage == "sft" else "pairs.jsonl")
    chosen = {"data": data} | changes
    model_command(stage, *trainer_runs.flags(trainer_world, chosen.pop("data"), "run", **chosen)).assert_refused(
        *pieces
    )


def test_a_conversation_needs_a_chat_template(model_command: Command, trainer_world: Path, tmp_path: Path) -> None:
    trainer_runs.save_model(tmp_path / "plain", template=None)
    flags = trainer_runs.flags(trainer_world, trainer_world / "chats.jsonl", "run", model="plain")
    model_command("sft", *flags).assert_refused("model's tokenizer: got", "a chat template")


def test_rows_that_are_left_out_or_cut_are_counted(model_command: Command, trainer_world: Path, tmp_path: Path) -> None:
    rows = [*trainer_runs.pairs(8), {"prompt": "x", "chosen": " y" * 90, "rejected": " z"}]
    rows.append({"prompt": "x", "chosen": " y", "rejected": " y"})
    trainer_runs.write(tmp_path / "rows.jsonl", rows)
    for how, text in (("drop", "they are left out"), ("truncate", "they are cut there, and have no end token")):
        done = model_command("dpo", *trainer_runs.flags(trainer_world, "rows.jsonl", how, overlong=how))
        done.assert_done()
        assert f"1 rows are longer than max_length 64 tokens: {text}." in done.err
        assert "1 rows are pairs of two equal texts: they teach nothing and are left out." in done.err
