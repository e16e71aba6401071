"""`apportion doctor --config`: every check finds what is planted for it and names the fix; a good run passes."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import foreign_models
import planted
import planted_texts
import pytest
import tiny_runs
import torch
import yaml

from apportion.models.pretrained import load_settings
from apportion.models.tokenizers import load_tokenizer
from apportion.stages.doctor import Case, reward
from apportion.stages.doctor.checks import machine, policy
from apportion.stages.doctor.rl import CHECKS, PREFLIGHT, preflight

Command = Callable[..., Any]
PLANTED = planted.PLANTED | planted_texts.PLANTED
NEVER_PLANTED = {"reference"}  # no setting moves it: its test below stirs the adapters


@pytest.fixture(scope="session")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return planted.good(tmp_path_factory.mktemp("good"))


@pytest.fixture(scope="session")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return foreign_models.world(tmp_path_factory.mktemp("foreign"))


def findings(done: Any) -> dict[str, dict[str, str]]:
    """Return the findings of a `--json` run by name, once the object is what it should be."""
    assert "Traceback" not in done.err, done.err
    report = json.loads(done.out)
    assert set(report) == {"stage", "fast", "passed", "counts", "findings"}
    assert report["passed"] == (report["counts"]["fail"] == 0) == (done.code == 0), done.out
    assert sum(report["counts"].values()) == len(report["findings"])
    return {one["name"]: one for one in report["findings"]}


@pytest.mark.parametrize("name", PLANTED)
def test_what_is_planted_is_found(model_command: Command, good: Path, tmp_path: Path, name: str) -> None:
    make, check, level, pieces, fast = PLANTED[name]
    flags = planted.flags(good, **make(good, tmp_path))
    results = findings(model_command("doctor", *flags, "--json", *(["--fast"] if fast else [])))
    one = results[check]
    assert one["level"] == level, results
    assert one["fix"].endswith(".") and one["message"]
    for piece in pieces:
        assert piece in f"{one['message']} {one['fix']}", one
    blamed = {other["name"] for other in results.values() if other["level"] == "fail"} - {check}
    assert not blamed or level == "fail", f"{blamed} fail as well"


def test_every_check_has_something_planted_for_it() -> None:
    known = {one.name for one in CHECKS}
    assert {one.check for one in PLANTED.values()} | NEVER_PLANTED == known
    assert len({one.check for one in PLANTED.values()}) >= 12


def test_a_good_run_passes_wholly(model_command: Command, good: Path, tmp_path: Path) -> None:
    other = planted.rows(tmp_path / "other.jsonl", ["A new story", "Some other beginning"])
    flags = planted.flags(good, eval_prompts=other)
    results = findings(model_command("doctor", *flags, "--json"))
    assert {name: one for name, one in results.items() if one["level"] != "ok"}.keys() == {
        "chat template",
        "likely beginning",
    }
    assert list(results) == [one.name for one in CHECKS]


@pytest.mark.parametrize("name", ["encoder", "other", "trimming", "chat"])
def test_reward_models_with_tokenizers_of_their_own_pass(model_command: Command, foreign: Path, name: str) -> None:
    results = findings(model_command("doctor", *tiny_runs.flags(foreign, reward_model=foreign / name), "--json"))
    assert not [one for one in results.values() if one["level"] == "fail"], results
    assert "it scores text" in results["reward tokenizer"]["message"]
    for check in ("reward padding", "attention row", "scores"):
        assert results[check]["level"] == "ok", results[check]
    assert ("left" in results["reward padding"]["message"]) == (name != "encoder")  # encoders are padded on the right


def test_a_good_run_on_conversations_that_end_passes(model_command: Command, good: Path, tmp_path: Path) -> None:
    template = planted.TURNS.replace("{END}", "<eos>") + planted.ASKS
    flags = planted.flags(good, **planted.conversations(good, tmp_path, template, **{"sampling.stop": "eos"}))
    results = findings(model_command("doctor", *flags, "--json", "--fast"))
    assert {one["level"] for one in results.values()} <= {"ok", "skip"}, results
    assert results["chat template"]["level"] == "ok" and "assistant" in results["chat template"]["message"]


def test_adapters_that_do_something_are_no_reference(good: Path) -> None:
    """A policy whose reference differs: no setting makes one, so its adapters are changed."""
    config = tiny_runs.config(good)
    case = Case(config, rows=tiny_runs.prompts(), policy=tiny_runs.policy(good, stirred=False))
    assert policy.reference(case)[0] == "ok"
    tiny_runs.stir(case.policy)
    level, message, fix = policy.reference(case)
    assert level == "fail" and "without its adapters" in message and "merged weights" in fix


def test_labels_and_a_table_that_a_person_reads(model_command: Command, good: Path, tmp_path: Path) -> None:
    with (good / "reviews.csv").open(newline="") as file:
        rows = [(row["text"], 1 - int(row["label"])) for row in csv.DictReader(file)]
    flags = planted.flags(good, labels=labelled(tmp_path / "turned.csv", rows), reward_model=good / "judge" / "final")
    done = model_command("doctor", *flags)
    assert done.code == 2 and done.err == ""
    levels = {line.split("│")[1].strip(): line.split("│")[2].strip() for line in done.out.splitlines() if "│" in line}
    assert list(levels) == [one.name for one in CHECKS]
    assert [name for name, level in levels.items() if level == "fail"] == ["order of scores"]
    assert "\nfail order of scores: Its labels are swapped" in done.out
    assert done.out.rstrip().endswith(", 1 fail, 3 skip")


@pytest.mark.parametrize(
    ("words", "pieces"),
    [
        (["--stage", "sample"], ["--stage: got 'sample'", "one of ", "rl"]),
        (["--fast=1"], ["--fast: got '1'", "Write --fast without a value"]),
        (["--eval_prompts"], ["--eval_prompts: got 'nothing'", "--eval_prompts VALUE"]),
        (["--stepz", "3"], ["flag: got '--stepz'", "Did you mean '--steps'"]),
        (["--config", "absent.yaml"], ["--config: got 'absent.yaml'", "check the path"]),
    ],
)
def test_its_own_flags_are_checked_before_any_model(command: Command, words: list[str], pieces: list[str]) -> None:
    command("doctor", "--fast", *words).assert_refused_early(*pieces)


def test_what_it_compares_with_has_to_be_there(model_command: Command, good: Path) -> None:
    done = model_command("doctor", *planted.flags(good, eval_prompts="absent.jsonl"), "--fast")
    assert done.code == 2 and done.err.startswith("apportion: prompts: got 'absent.jsonl'"), done.err


def test_a_file_of_settings_is_read_and_flags_win(model_command: Command, good: Path, tmp_path: Path) -> None:
    flags = planted.flags(good)
    settings = yaml.safe_dump({"reward_model": str(good / "policy"), "compare": [], "credit": "sparse"})
    (tmp_path / "run.yaml").write_text(settings)
    results = findings(model_command("doctor", "--config", "run.yaml", *flags, "--json"))
    assert (
        results["reward head"]["level"] == "ok"
        and results["attention row"]["message"] == "no credit of this run uses it"
    )


@pytest.mark.parametrize("name", [n for n, one in PLANTED.items() if one.check in PREFLIGHT and one.check != "memory"])
def test_rl_runs_the_preflight_checks_itself(model_command: Command, good: Path, tmp_path: Path, name: str) -> None:
    make, check, level, pieces, _ = PLANTED[name]
    done = model_command("rl", *planted.flags(good, **make(good, tmp_path)), "--steps", "1", "--output", "run")
    if name == "fewer embeddings than tokens":  # found with the row that it is in
        check, pieces = "prompts", ("400 embeddings", "prompt 1", "skip_bad_rows")
    if level == "fail":
        done.assert_refused(f"{check}: got ", *(piece for piece in pieces if "'" not in piece))
        assert json.loads((tmp_path / "run" / "status.json").read_text())["status"] == "failed"
        return
    done.assert_done()
    assert f"warning: {check}: " in done.err
    warnings = json.loads((tmp_path / "run" / "status.json").read_text())["doctor"]
    assert check in [one["name"] for one in warnings]
    assert all(f"{one['message']}. {one['fix']}" in done.err for one in warnings)


def test_counting_the_weights_of_a_hub_model_uses_no_random_number(good: Path) -> None:
    """A run's adapters are initialised after its preflight checks: the seed must give the same weights."""
    settings = load_settings("policy", str(good / "policy"))
    before = torch.get_rng_state()
    counted = machine.weights_of(Case(None, policy_folder="nobody/model", policy_settings=settings), "policy")
    stored = machine.weights_of(Case(None, policy_folder=str(good / "policy"), policy_settings=settings), "policy")
    assert counted == stored > 10_000 and torch.equal(torch.get_rng_state(), before)


def test_memory_is_an_estimate_that_stops_no_run(good: Path) -> None:
    """The command would really allocate it, so only the preflight checks run."""
    config = tiny_runs.config(good, **{"sampling.batch_size": 6 * 10**8})
    tokenizer = load_tokenizer("policy", config.policy)
    results = preflight(config, config.policy, tokenizer, ["a film"], [[5, 6]])
    assert [(one.name, one.level) for one in results] == [("memory", "fail")] and "sampling.rows" in results[0].fix


def test_a_sound_run_gets_no_warning(model_command: Command, good: Path, tmp_path: Path) -> None:
    done = model_command("rl", *planted.flags(good, **{"optim.lr": 1e-4}), "--output", "run")
    done.assert_done()
    assert "warning" not in done.err and "doctor" not in json.loads((tmp_path / "run" / "status.json").read_text())


def test_the_reward_stage_is_checked_as_well(model_command: Command, good: Path) -> None:
    flags = (
        "--stage",
        "reward",
        "--model",
        good / "policy",
        "--data",
        good / "reviews.csv",
        "--excerpt_tokens",
        "[4,24]",
    )
    results = findings(model_command("doctor", *flags, "--json"))
    assert list(results) == [one.name for one in reward.CHECKS]
    assert {one["level"] for one in results.values()} == {"ok"}, results


def ranked(path: Path, count: int, **more: Any) -> Path:
    """Write rankings of two answers."""
    rows = [{"prompt": f"Film {i}:", "completions": [f" good {i}", f" bad {i}"], "ranks": [1, 2]} for i in range(count)]
    path.write_text("".join(json.dumps(row | more) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    ("rows", "more", "check", "level", "piece"),
    [
        (40, {}, "labels", "ok", "held-out rankings with"),
        (40, {}, "excerpts", "ok", "context 128; 0 of"),
        (40, {"ranks": [1, 1]}, "labels", "fail", "have no pair (all tied, or not judged)"),
        (40, {"prompt": "x" * 400}, "labels", "fail", "0 held-out rankings"),
        (40, {"ranks": ["1", "2"]}, "labels", "fail", "ranks[0] = '1' (str)"),
        (40, {"completions": ["a " * 30, "b"]}, "excerpts", "warn", "Raise preferences.max_tokens"),
    ],
)
def test_rankings_are_checked_as_well(
    model_command: Command, good: Path, tmp_path: Path, rows: int, more: Any, check: str, level: str, piece: str
) -> None:
    words = ["--model", good / "policy", "--data", ranked(tmp_path / "d.jsonl", rows, **more)]
    words += ["--preferences.max_tokens", "20"]
    one = findings(model_command("doctor", "--stage", "reward", *words, "--json"))[check]
    assert one["level"] == level and piece in one["message"] + one["fix"], one


def labelled(path: Path, rows: list[tuple[str, int]]) -> Path:
    """Write labelled texts as CSV."""
    path.write_text("text,label\n" + "".join(f'"{text}",{label}\n' for text, label in rows))
    return path


@pytest.mark.parametrize(
    ("check", "rows", "test", "more", "pieces"),
    [
        ("labels", [("a film", 1), ("a story", 0)], [("a cast", 1)], {}, ["1 of 1 held-out", "both kinds"]),
        ("repeated texts", [("a film", 1), ("A  film", 0)], None, {}, ["1 with the other label", "Drop those texts"]),
        ("held-out texts", [("a film", 1), ("a story", 0)], [("a film", 1), ("b", 0)], {}, ["1 of 2", "--test_data"]),
        ("excerpts", None, None, {"excerpt_tokens": "[8,200]"}, ["context 128", "Lower the second number"]),
        ("pad token", None, None, {"pad_token": "[PAD]"}, ["a token of the vocabulary", "reserved token"]),
        ("vocabulary", [("hello", 1), ("a story", 0)], None, {"model": "more"}, ["1 ids in use have none: 400"]),
        ("model", None, None, {"model": "./none"}, ["check the path"]),
    ],
)
def test_what_is_wrong_with_labelled_texts_is_found(
    model_command: Command, good: Path, tmp_path: Path, check: str, rows: Any, test: Any, more: Any, pieces: list[str]
) -> None:
    planted.tokenizer_of(planted.policy(good, tmp_path / "more"), planted.longer())
    settings = {"model": good / "policy", "data": good / "reviews.csv", "excerpt_tokens": "[2,24]"} | more
    if rows is not None:
        fine = [("b", 0), ("c", 1)] if test is None else test
        settings |= {"data": labelled(tmp_path / "d.csv", rows), "test_data": labelled(tmp_path / "t.csv", fine)}
    words = [word for name, value in settings.items() for word in (f"--{name}", value)]
    one = findings(model_command("doctor", "--stage", "reward", *words, "--json"))[check]
    assert one["level"] == "fail" and all(piece in f"{one['message']} {one['fix']}" for piece in pieces), one
