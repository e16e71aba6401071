"""Broken files given to the command: YAML settings, CSV and JSON lines; found before any model library is loaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Command = Callable[..., Any]


@pytest.mark.parametrize(
    ("content", "pieces"),
    [
        ("stepz: 3\n", ["c.yaml: key: got 'stepz'", "Did you mean 'steps'"]),
        ("optim:\n  lrr: 3\n", ["c.yaml: key: got 'optim.lrr'", "Did you mean 'optim.lr'"]),
        ("3: 4\n", ["c.yaml: key: got '3'", "one of advantages"]),
        ("optim: 5\n", ["c.yaml: optim: got 5", "a mapping of its settings", "Indent them"]),
        ("optim:\n", ["c.yaml: optim: got None", "a mapping of its settings"]),
        ("policy: null\n", ["c.yaml: policy: got None", "a name or a path"]),
        ("steps: [1, 2]\n", ["c.yaml: steps: got [1, 2]", "whole number >= 1"]),
        ("optim:\n  lr: fast\n", ["c.yaml: optim.lr: got 'fast'", "a number > 0"]),
        ("scores:\n  clip: -1\n", ["c.yaml: scores.clip: got -1;", "a number > 0"]),
        ("algorithm: abcc\n", ["algorithm: got 'abcc'", "Did you mean 'abc'"]),
        ("credit: atention\n", ["credit: got 'atention'", "Did you mean 'attention'"]),
        ("credit:\n  attention:\n    mixx: 1\n", ["credit.attention: got 'mixx'", "Did you mean 'mix'"]),
        ("credit:\n- uniform\n- attention\n", ["got 'uniform with attention'"]),
        ("credit.mix: 0.4\n", ["c.yaml: key: got 'credit.mix'", "nested keys", "attention: {mix: 0.4}"]),
        ("segments: {tokens: {n: 3}}\n", ["segments.tokens: got 'n'", "no settings", "Remove n"]),
        ("steps: 3\n  bad: [\n", ["--config: got 'c.yaml'", "valid YAML in UTF-8", "line 2"]),
        ("steps: !!python/object/apply:os.getcwd []\n", ["--config: got 'c.yaml'", "valid YAML"]),
        ("- a\n- b\n", ["--config: got 'c.yaml'", "a mapping of settings", "Example: `steps: 20`"]),
        ("", ["--config: got 'c.yaml'", "a mapping of settings"]),
        (b"policy: na\xefve\n".decode("latin1"), ["--config: got 'c.yaml'", "valid YAML in UTF-8", "0xef"]),
    ],
)
def test_a_broken_configuration_is_named(command: Command, tmp_path: Path, content: str, pieces: list[str]) -> None:
    (tmp_path / "c.yaml").write_bytes(content.encode("latin1"))
    command("rl", "--reward_model", "x", "--config", "c.yaml").assert_refused_early(*pieces)


def test_an_absent_configuration_is_named(command: Command, tmp_path: Path) -> None:
    command("rl", "--config", "absent.yaml").assert_refused_early(
        "--config: got 'absent.yaml'", "There is no such file"
    )
    command("rl", "--config", ".").assert_refused_early("--config: got '.'", "a YAML file")


def test_flags_win_over_the_file_wherever_they_stand(command: Command, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("reward_model: x\nsteps: 3\n")
    for arguments in (["--steps", 9, "--config", "c.yaml"], ["--config", "c.yaml", "--steps", 9]):
        done = command("rl", *arguments, "--dry_run")
        done.assert_done()
        assert "\nsteps: 9\n" in done.out


@pytest.mark.parametrize(
    ("name", "content", "pieces"),
    [
        (
            "a.csv",
            b"review,label\nx,1\n",
            ["data: got", "columns review, label", "a column 'text'", "--text_column review"],
        ),
        ("a.csv", b'text,label\n"  ",1\n', ["a.csv, line 2: text = '  '", "Fill it in"]),
        ("a.csv", b"text,label\nfine,2\n", ["a.csv, line 2: label = '2'", "neg, negative", "Write 1"]),
        ("a.csv", b"text,label\nna\xefve,1\n", ["a.csv, line 2: byte 0xef", "UTF-8", "iconv"]),
        ("a.csv", b"text,label\n", ["a.csv: no rows", "at least one row"]),
        ("a.txt", b"text,label\n", ["data: got 'a.txt'", "ends in .csv, .jsonl", "Convert it"]),
        ("a.csv", b"text,label\nonly one,1\n", ["data: got '1 rows'", "hold a tenth of them out", "--test_data"]),
        ("a.csv", b"text,label\n" + b"".join(b"%d,1\n" % i for i in range(40)), ["all with label 1", "both labels"]),
    ],
)
def test_broken_reviews_are_named(
    command: Command, tmp_path: Path, world: Path, name: str, content: bytes, pieces: list[str]
) -> None:
    (tmp_path / name).write_bytes(content)
    command("reward", "--model", world / "policy", "--data", name, "--output", "run").assert_refused_early(*pieces)


def test_broken_test_data_is_named_as_such(command: Command, tmp_path: Path, world: Path) -> None:
    (tmp_path / "a.csv").write_text("text,label\n")
    data = ("--data", world / "reviews.csv", "--test_data", "a.csv", "--output", "run")
    command("reward", "--model", world / "policy", *data).assert_refused_early("test_data: got 'a.csv: no rows'")


@pytest.mark.parametrize(
    ("name", "content", "pieces"),
    [
        ("p.jsonl", b'{"prompt": "a"}\n{oops\n', ["prompts: got 'p.jsonl, line 2, column 2", "valid JSON", "one JSON"]),
        ("p.jsonl", b'{"prompt": "a"}\n[1]\n', ["p.jsonl, line 2: list [1]", "a JSON object"]),
        ("p.jsonl", b'{"prompts": "a"}\n', ["p.jsonl, line 1: columns prompts", "a column 'prompt'", "Did you mean"]),
        ("p.jsonl", b'{"prompt": "a"}\n{"prompt": ""}\n', ["p.jsonl, line 2: prompt = ''", "Fill it in"]),
        ("p.jsonl", b"", ["p.jsonl: no rows", "at least one row"]),
        ("p.txt", b"hello", ["prompts: got 'p.txt'", "ends in .csv, .jsonl"]),
        ("other.jsonl", b'{"prompt": "a"}\n', ["prompts: got 'p.jsonl'", "that exists", "Did you mean 'other.jsonl'"]),
    ],
)
def test_broken_prompts_are_named(
    command: Command, tmp_path: Path, rl_flags: list[str], name: str, content: bytes, pieces: list[str]
) -> None:
    (tmp_path / name).write_bytes(content)
    given = name if name.startswith("p.") else "p.jsonl"
    command("rl", *rl_flags, "--prompts", given).assert_refused_early(*pieces)


def test_a_fixed_configuration_replaces_a_failed_one(
    model_command: Command, tmp_path: Path, rl_flags: list[str]
) -> None:
    model_command("rl", *rl_flags, "--prompts", "absent.jsonl").assert_refused("prompts: got 'absent.jsonl'")
    status = (tmp_path / "run" / "status.json").read_text()
    assert '"failed"' in status and "absent.jsonl" in status
    model_command("rl", *rl_flags).assert_done()
    assert "absent" not in (tmp_path / "run" / "config.yaml").read_text()
    assert '"finished"' in (tmp_path / "run" / "status.json").read_text()
