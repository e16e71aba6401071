"""Every class of bad input once through `python -m apportion` itself, in a new process as a user starts it.

A start takes seconds. `make test` has one case of each class here; the others run in `make test-long`, since the other
files of this folder have them, and many more, in processes forked from one that has the libraries imported.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

Command = Callable[..., Any]
LONG = "film" + " film" * 130


def one_of(*cases: Any) -> list[Any]:
    """Return the cases, all but the first for `make test-long`."""
    first, *rest = cases
    return [first, *(pytest.param(*case, marks=pytest.mark.long) for case in rest)]


@pytest.fixture
def apportion(python: Command) -> Command:
    """Return the command, each in a new process."""
    return lambda *arguments: python("-m", "apportion", *arguments)


@pytest.mark.parametrize(
    ("arguments", "pieces"),
    one_of(
        (["--stepz", "3"], ["flag: got '--stepz'", "Did you mean '--steps'"]),
        (["--algorithm", "abcd"], ["algorithm: got 'abcd'", "Did you mean 'abc-d'"]),
        (["--credit", "atention"], ["credit: got 'atention'", "Did you mean 'attention'"]),
        (["--credit.mix", "1.5"], ["attention.mix: got 1.5", "a number in [0, 1]"]),
        (["--credit.mix", "-0.1"], ["attention.mix: got -0.1", "a number in [0, 1]"]),
        (["--policy", "./absent"], ["policy: got", "a model folder, or a hub id"]),
        (["--policy", "empty"], ["policy: got 'empty'", "config.json and weights"]),
    ),
)
def test_flags_methods_and_absent_models(
    apportion: Command, tmp_path: Path, rl_flags: list[str], arguments: list[str], pieces: list[str]
) -> None:
    (tmp_path / "empty").mkdir()
    apportion("rl", *rl_flags, *arguments).assert_refused(*pieces)


@pytest.mark.long  # test_corpus.py has such files, in forked processes
@pytest.mark.parametrize(
    ("content", "pieces"),
    one_of(
        ("stepz: 3\n", ["stepz", "Did you mean 'steps'"]),
        ("credit: atention\n", ["credit: got 'atention'", "Did you mean 'attention'"]),
        ("credit: {attention: {mix: 7}}\n", ["attention.mix: got 7", "a number in [0, 1]"]),
    ),
)
def test_configuration_files(
    apportion: Command, tmp_path: Path, rl_flags: list[str], content: str, pieces: list[str]
) -> None:
    (tmp_path / "a.yaml").write_text(content)
    apportion("rl", "--config", "a.yaml", *rl_flags).assert_refused(*pieces)


@pytest.mark.long
def test_a_discount_under_redistribution_warns(apportion: Command, rl_flags: list[str]) -> None:
    done = apportion("rl", *rl_flags, "--dry_run", "--advantages.gamma", "0.9")
    done.assert_done()
    assert "warning" in done.err and "gamma" in done.err


@pytest.mark.long  # test_corpus.py has such tables, one of them in a new process
@pytest.mark.parametrize(
    ("content", "pieces"),
    one_of(
        (b"review,label\nx,1\n", ["data: got", "a column 'text'"]),
        (b'text,label\n"  ",1\n', ["a.csv, line 2: text = '  '"]),
        (b"text,label\nfine,2\n", ["a.csv, line 2: label = '2'"]),
        (b"text,label\nna\xefve,1\n", ["a.csv, line 2: byte 0xef", "UTF-8"]),
        (b"text,label\n", ["a.csv: no rows"]),
    ),
)
def test_tables_of_reviews(apportion: Command, tmp_path: Path, world: Path, content: bytes, pieces: list[str]) -> None:
    (tmp_path / "a.csv").write_bytes(content)
    done = apportion("reward", "--model", world / "policy", "--data", "a.csv", "--output", "run")
    done.assert_refused(*pieces)


@pytest.mark.long  # test_corpus.py has such tables, one of them in a new process
@pytest.mark.parametrize(
    ("content", "pieces"),
    one_of(
        (b'{"prompts": "a"}\n', ["p.jsonl, line 1: columns prompts", "a column 'prompt'"]),
        (b'{"prompt": ""}\n', ["p.jsonl, line 1: prompt = ''"]),
        (b'{"prompt": "a\xff"}\n', ["p.jsonl, line 1: byte 0xff"]),
        (b"", ["p.jsonl: no rows"]),
        (json.dumps({"prompt": LONG}).encode(), ["prompt 1: got", "context 128", "Shorten it"]),
    ),
)
def test_tables_of_prompts(
    apportion: Command, tmp_path: Path, rl_flags: list[str], content: bytes, pieces: list[str]
) -> None:
    (tmp_path / "p.jsonl").write_bytes(content)
    flags = ("--prompts", "p.jsonl", "--sampling.prompt_tokens", "null")
    apportion("rl", *rl_flags, *flags).assert_refused(*pieces)


@pytest.mark.parametrize(
    ("flag", "name", "pieces"),
    one_of(
        ("policy", "no-weights", ["policy: got", "weights in safetensors"]),
        ("policy", "quantised", ["policy: got", "quantised by gptq", "Use the unquantised model"]),
        ("policy", "recurrent", ["policy: got", "of the family recurrent_gemma", "read padding as text"]),
        ("reward_model", "nan-head", ["score of rollout 0: got nan", "A failure never becomes a reward"]),
    ),
)
def test_models_that_cannot_be_used(
    apportion: Command, broken: Path, rl_flags: list[str], flag: str, name: str, pieces: list[str]
) -> None:
    done = apportion("rl", *rl_flags, f"--{flag}", broken / name)
    done.assert_refused(*pieces)
    assert not (done.folder / "run" / "rollouts.jsonl").exists()


@pytest.mark.long  # test_output_errors.py has it in forked processes
def test_a_folder_of_another_configuration(apportion: Command, tmp_path: Path, rl_flags: list[str]) -> None:
    apportion("rl", *rl_flags).assert_done()
    kept = (tmp_path / "run" / "final" / "model.safetensors").read_bytes()
    done = apportion("rl", *rl_flags, "--steps", 3)
    assert done.code == 2 and "output: got 'run with steps 3'" in done.err and "--fresh" in done.err
    assert (tmp_path / "run" / "final" / "model.safetensors").read_bytes() == kept


@pytest.mark.long  # test_disk_errors.py has full file systems and files that may not grow
@pytest.mark.skipif(sys.platform != "linux", reason="/dev/full is Linux's")
def test_no_room_on_the_disk(python: Command, world: Path, tiny: ModuleType) -> None:
    # a full file system of its own is tried in test_disk_errors.py; here a file that may not grow
    script = f'ulimit -f 8; exec "{sys.executable}" -m apportion reward "$@"'
    flags = ("--model", world / "policy", "--data", world / "reviews.csv", "--output", "run", "--excerpts", 8)
    done = python("-c", RUN_SHELL, script, *flags)
    assert done.code == 2 and "Traceback" not in done.err, done.err
    assert "output: got 'run (" in done.err and "File too large" in done.err


RUN_SHELL = "import os, sys; os.execvp('sh', ['sh', '-c', sys.argv[1], 'sh', *sys.argv[2:]])"
