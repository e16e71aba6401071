"""Bad input of `apportion evaluate --policies`: one message with its fix, before any model is loaded."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Command = Callable[..., Any]


@pytest.fixture(scope="session")
def policies(tmp_path_factory: pytest.TempPathFactory, world: Path, tiny: Any) -> Path:
    """Return a folder with two more policies, runs in every state, and files of answers."""
    folder = tmp_path_factory.mktemp("policies")
    tiny.save_policy(folder / "a", seed=2)
    for name, stage, status in (
        ("running", "rl", "running"),
        ("reward", "reward", "finished"),
        ("rl", "rl", "finished"),
    ):
        (folder / name).mkdir()
        (folder / name / "config.yaml").write_text(f"policy: {world / 'policy'}\nreward_model: {world / 'reward'}\n")
        (folder / name / "status.json").write_text(json.dumps({"stage": stage, "status": status}))
        shutil.copytree(folder / "a", folder / name / "final")
    prompts = [json.loads(line)["prompt"] for line in (world / "prompts.jsonl").read_text().splitlines()]
    rows = [{"prompt": prompt, "completions": ["one", "two"]} for prompt in prompts]
    for name, lines in {
        "answers": rows,
        "fewer": [row for row in rows if row["prompt"] != prompts[3]],
        "warm": [row | {"settings": {"temperature": 0.5}} for row in rows],
        "ragged": [row | {"ended": [True]} for row in rows],
        "numbers": [row | {"completions": [1, 2]} for row in rows],
        "flat_ids": [row | {"completion_ids": [5, 6]} for row in rows],
        "null_ids": [row | {"completion_ids": [[5], None]} for row in rows],
        "words": [row | {"logprobs": [["a"], [0.5]]} for row in rows],
        "nulls": [row | {"logprobs": [[None], [-0.5]]} for row in rows],
        "yes": [row | {"ended": ["yes", "no"]} for row in rows],
        "half": [row | {"completions": ["one", "\ud83d two"]} for row in rows],
        "long": [row | {"completions": ["one", "word " * 200]} for row in rows],
    }.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    return folder


def given(policies: Path, world: Path, *names: str, start: str | None = "policy") -> list[Any]:
    flags = ["--policies", *(policies / name for name in names), "--prompts", world / "prompts.jsonl"]
    flags += ["--sampling.max_new_tokens", "8"]
    return [*flags, *(["--start", world / start] if start else [])]


JUDGE = ("--judges", "regex", "--judges.regex.pattern", "a")
CASES: list[tuple[list[str], list[str], list[str]]] = [
    (["a", "a"], [*JUDGE], ["policies: got ", "a twice", "each policy once"]),
    (["a"], [], ["rewards: got None", "a reward or a judge", "Add --rewards or --judges"]),
    (["a"], [*JUDGE, "--bucket", "topik"], ["bucket: got 'topik'", "a column of the prompts, or length"]),
    (["a"], ["--judges", "nowhere:judge"], ["nowhere:judge", "The import failed"]),
    (["a"], ["--judges", "absent/reward/model"], ["judges: got 'absent/reward/model'", "check the path"]),
    (["a"], ["--judges", "{imdb: {weight: 2}}"], ["judges.imdb: got 'weight'", "no settings"]),
    (["a"], ["--judges", "imdb", "imdb"], ["judges: got ['imdb', 'imdb']", "a name of its own"]),
    (["a"], ["--judges", "exact"], ["no column", "answer"]),
    (["a"], [*JUDGE, "--against", "everyone"], ["against: got 'everyone'", "one of start, all"]),
    (["a"], [*JUDGE, "--judge", "false"], ["judge: got False", "policies are given"]),
    (["running"], [*JUDGE], ["which is running", "Finish it with `apportion rl"]),
    (["reward"], [*JUDGE], ["of `apportion reward`", "Name a run that trained a policy"]),
    (["rl"], [*JUDGE, "--checkpoint", "best"], ["without best/", "Use --checkpoint final"]),
    (["absent"], [*JUDGE], ["policies: got ", "absent", "There is no such folder"]),
    (["fewer.jsonl"], [*JUDGE], ["without an answer to prompt 4", "Give --prompts the prompts that it answers"]),
    (["warm.jsonl"], [*JUDGE], ["temperature 0.5", "Pass --sampling.temperature 0.5"]),
    (["ragged.jsonl"], [*JUDGE], ["ended = [True]", "a list of 2"]),
    (["numbers.jsonl"], [*JUDGE], ["completions = [1, 2]", "a list of at least one text"]),
    (["flat_ids.jsonl"], [*JUDGE], ["line 1: completion_ids = [5, 6]", "a list of token ids for each completion"]),
    (["null_ids.jsonl"], [*JUDGE], ["completion_ids = [[5], None]", "a list of token ids for each completion"]),
    (["words.jsonl"], [*JUDGE], ["logprobs = [['a'], [0.5]]", "a list of numbers for each completion"]),
    (["nulls.jsonl"], [*JUDGE], ["logprobs = [[None], [-0.5]]", "a list of numbers for each completion"]),
    (["yes.jsonl"], [*JUDGE], ["ended = ['yes', 'no']", "true, false or null"]),
    (["half.jsonl"], [*JUDGE], ["line 1: a lone surrogate in completions", "valid Unicode"]),
    (["long.jsonl"], [*JUDGE], ["an answer to prompt 1 of ", "at most 128 tokens in all, the start's context"]),
    (["a"], ["--judges", "{json: {weight: -2}}"], ["judges.json.weight: got -2", "a measure by itself", "--rewards"]),
    (["a"], ["--judges", "{json: {normalise: batch}}"], ["judges.json.normalise: got 'batch'", "Remove it"]),
]  # fmt: skip


@pytest.mark.parametrize(("names", "flags", "pieces"), CASES, ids=[" ".join([*c[0], *c[1]])[:60] for c in CASES])
def test_a_mistake_is_one_message_before_a_model_is_loaded(
    model_command: Command, policies: Path, world: Path, names: list[str], flags: list[str], pieces: list[str]
) -> None:
    done = model_command("evaluate", *given(policies, world, *names), *flags)
    assert done.code == 2 and "Traceback" not in done.err
    assert all(piece in done.err for piece in pieces), done.err
    assert "Loading weights" not in done.err and "answered prompts" not in done.err


def test_a_start_that_nobody_recorded_has_to_be_named(model_command: Command, policies: Path, world: Path) -> None:
    done = model_command("evaluate", *given(policies, world, "a", start=None), *JUDGE)
    assert done.code == 2 and "start: got None" in done.err and "Add --start MODEL" in done.err
    done = model_command("evaluate", *given(policies, world, "answers.jsonl", start=None), *JUDGE)
    assert done.code == 2 and "start: got None" in done.err


def test_the_start_alone_is_no_comparison(model_command: Command, policies: Path, world: Path) -> None:
    done = model_command("evaluate", "--policies", world / "policy", "--start", world / "policy", *JUDGE)
    assert done.code == 2 and "one that is not the start" in done.err


def test_settings_of_the_other_kind_are_refused_without_loading_anything(command: Command) -> None:
    done = command("evaluate", "--run", "run", "--against", "all")
    assert done.code == 2 and done.loads_nothing and "against: got 'all'" in done.err and "Add --policies" in done.err
    done = command("evaluate", "--policies", "a", "b", "--run", "c")
    assert done.code == 2 and done.loads_nothing and "run: got 'c'" in done.err


def test_an_empty_list_of_policies_is_refused(command: Command) -> None:
    done = command("evaluate", "--policies", "[]")
    assert done.code == 2 and done.loads_nothing and "policies: got []" in done.err


def test_dry_run_shows_the_settings_of_several_words(command: Command) -> None:
    done = command("evaluate", "--policies", "runs/a", "runs/b c", "--judges", "imdb", "{x:y: {name: z}}", "--dry-run")
    assert done.code == 0 and done.loads_nothing
    assert "policies:\n- runs/a\n- runs/b c\n" in done.out and "judges:\n- imdb\n- x:y:\n    name: z\n" in done.out
