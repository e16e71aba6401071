"""`apportion split`: no prompt of the evaluation is trained on, and every later stage reads the files."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import tiny_runs
from commands import Server

from apportion.data.answers import PairReader
from apportion.data.answers.rankings import read_rankings
from apportion.data.dialogues import dialogue
from apportion.data.formats import Row


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def conversations(count: int) -> list[dict[str, Any]]:
    """Return rankings of conversations; every third prompt is the second turn of the one before it."""
    rows = []
    for i in range(count):
        root = user(f"Question {i - i % 3}?")
        turns = [root, {"role": "assistant", "content": "Well."}, user("And?")] if i % 3 == 2 else [root]
        turns = turns if i % 3 != 1 else [user(f"QUESTION  {i - i % 3}?")]  # the same but for case and white space
        rows.append({"prompt": turns, "completions": [f"worst {i}", f"best {i}", f"middle {i}"], "ranks": [3, 1, 2]})
    return rows


def pairs(count: int) -> list[dict[str, Any]]:
    return [
        {
            "prompt": f"Human: Question {i}?\nAssistant: Yes.\nHuman: So?\n",
            "chosen": f" good {i}",
            "rejected": f" bad {i}",
        }
        for i in range(count)
    ]


def split(server: Server, folder: Path, *words: object) -> dict[str, list[dict[str, Any]]]:
    done = server.run("split", "--output", "run", *words, cwd=folder)
    done.assert_done()
    return {path.stem: tiny_runs.read_lines(path) for path in (folder / "run").glob("*.jsonl")}


def beginning(row: dict[str, Any]) -> str:
    return " ".join(row["prompt"][0]["content"].lower().split())


def test_conversations_that_begin_alike_fall_into_one_part(light: Server, tmp_path: Path) -> None:
    write(tmp_path / "rankings.jsonl", conversations(90))
    write(tmp_path / "pairs.jsonl", pairs(60))
    words = ["--data", "[rankings.jsonl, pairs.jsonl]", "--dialogues", "true", "--held_out", "20"]
    files = split(light, tmp_path, *words)
    trained, held = ({beginning(row) for row in files[name]} for name in ("rankings", "held_out_rankings"))
    assert not trained & held and len(trained | held) == 70  # 30 of the rankings and 60 of the pairs share 20
    assert len(files["rankings"]) + len(files["held_out_rankings"]) == 150
    assert 20 <= len(files["held_out_prompts"]) <= 23
    assert {beginning(row) for row in files["held_out_prompts"]} == held
    assert {beginning(row) for row in files["prompts"]} == trained


def test_a_system_turn_that_all_have_is_no_beginning(light: Server, tmp_path: Path) -> None:
    rows = conversations(30)
    for row in rows:
        row["prompt"] = [{"role": "system", "content": "Be brief."}, *row["prompt"]]
    write(tmp_path / "rows.jsonl", rows)
    light.run("split", "--data", "rows.jsonl", "--held_out", 6, "--output", "run", cwd=tmp_path).assert_done()
    held, kept = (
        {row["prompt"][1]["content"].lower().strip() for row in tiny_runs.read_lines(tmp_path / "run" / name)}
        for name in ("held_out_rankings.jsonl", "rankings.jsonl")
    )
    assert held and kept and not {" ".join(one.split()) for one in held} & {" ".join(one.split()) for one in kept}


def test_the_best_answer_is_the_demonstration(light: Server, tmp_path: Path) -> None:
    write(tmp_path / "rankings.jsonl", [*conversations(30), *conversations(30)])
    files = split(light, tmp_path, "--data", "rankings.jsonl", "--held_out", "0")
    assert files["held_out_prompts"] == [] and len(files["demonstrations"]) == 30
    for row in files["demonstrations"]:
        assert row["completion"][0]["role"] == "assistant" and row["completion"][0]["content"].startswith("best")


def test_parts_depend_on_prompts_and_seed_and_not_on_the_order_of_rows(light: Server, tmp_path: Path) -> None:
    rows = conversations(60)
    write(tmp_path / "rows.jsonl", rows)
    first = split(light, tmp_path, "--data", "rows.jsonl", "--held_out", "12")
    random.Random(0).shuffle(rows)
    write(tmp_path / "rows.jsonl", rows)
    second = split(light, tmp_path, "--data", "rows.jsonl", "--held_out", "12", "--fresh")
    third = split(light, tmp_path, "--data", "rows.jsonl", "--held_out", "12", "--fresh", "--seed", "1")
    held = [{beginning(row) for row in one["held_out_prompts"]} for one in (first, second, third)]
    assert held[0] == held[1] != held[2]


def test_the_files_are_rankings_and_pairs_for_the_later_stages(light: Server, tmp_path: Path) -> None:
    write(tmp_path / "pairs.jsonl", pairs(20))
    files = split(light, tmp_path, "--data", "pairs.jsonl", "--dialogues", "true", "--held_out", "4")
    read = read_rankings(str(tmp_path / "run" / "rankings.jsonl"))
    assert len(read) == 16 and all(one.ranks == (1.0, 2.0) for one in read)
    reader = PairReader("data")
    (pair,) = reader(Row(files["rankings"][0], "line 1"))
    chosen, rejected = pair.chosen.content[-1], pair.rejected.content[-1]
    assert chosen["role"] == rejected["role"] == "assistant"
    assert chosen["content"].startswith("good") and rejected["content"].startswith("bad")


def test_long_prompts_are_left_out_and_counted(light: Server, tmp_path: Path) -> None:
    rows = [{"prompt": "x" * (10 * i + 1) + str(i), "completions": ["a", "b"], "ranks": [1, 2]} for i in range(10)]
    write(tmp_path / "rows.jsonl", rows)
    files = split(light, tmp_path, "--data", "rows.jsonl", "--held_out", "2", "--longest_prompt", "52")
    assert len(files["rankings"]) + len(files["held_out_rankings"]) == 6
    counts = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert counts["prompts_too_long"] == 4 and counts["prompts_read"] == 10 and counts["rankings"] == 4


@pytest.mark.parametrize(
    ("words", "pieces"),
    [
        ([], ["data: got []", "rankings or preference pairs"]),
        (["--data", "rows.jsonl", "--held_out", "9"], ["9 to hold out", "Lower --held_out"]),
        (["--data", "absent.jsonl"], ["data: got 'absent.jsonl'"]),
        (["--data", "[]"], ["data: got []"]),
    ],
)
def test_what_cannot_be_split_is_refused(words: list[str], pieces: list[str], light: Server, tmp_path: Path) -> None:
    write(tmp_path / "rows.jsonl", [{"prompt": f"{i}", "completions": ["a", "b"], "ranks": [1, 2]} for i in range(5)])
    light.run("split", *words, cwd=tmp_path).assert_refused(*pieces)


@pytest.mark.parametrize(
    ("text", "roles"),
    [
        ("Human: a\n", ["user"]),
        ("\n\nHuman: a\n\nAssistant:", ["user"]),
        ("\n\nHuman: a\n\nAssistant: b\n\nHuman: c: Human d\n\nAssistant:", ["user", "assistant", "user"]),
        ("Human: a\nAssistant: b\n", ["user", "assistant"]),
        ("Not one. Human: a", None),
        ("Human:\n\nAssistant: b", None),
        ("plain", None),
    ],
)
def test_dialogues_in_one_text(text: str, roles: list[str] | None) -> None:
    found = dialogue(text)
    assert (None if found is None else [turn["role"] for turn in found]) == roles
