"""Results that a comparison keeps on the way, damaged or of other prompts; odd names; measures without a score."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny_comparison
from tiny_comparison import figures, flags

from apportion.cli.main import main
from apportion.rewards import Rewards
from apportion.stages.evaluate.comparison import likelihood
from apportion.system.progress import current, describe


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_comparison.world(tmp_path_factory.mktemp("world"))


def test_prompts_that_changed_under_an_interrupted_comparison_are_refused(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Their answers are to the prompts as they were: scores of one and texts of the other would be no figures."""
    prompts = shutil.copy(world / "held.jsonl", tmp_path / "held.jsonl")
    given = flags(world, tmp_path / "run", [world / "ppo"], "--judges", "judges:broken", prompts=prompts)
    monkeypatch.setenv("BROKEN_JUDGE", "1")
    assert main(["evaluate", *given]) == 2
    monkeypatch.delenv("BROKEN_JUDGE")
    before = prompts.read_text()
    prompts.write_text(before.replace("film", "book"))
    capsys.readouterr()
    assert main(["evaluate", *given]) == 2
    error = capsys.readouterr().err
    assert f"prompts: got '{prompts}, whose prompts are not those of" in error and "--fresh" in error
    prompts.write_text(before)
    assert main(["evaluate", *given]) == 0


@pytest.mark.parametrize("name", ["scores/judge.vowels.jsonl", "logprobs/ppo.start.jsonl", "answers/ppo/samples.jsonl"])
def test_a_damaged_result_on_the_way_is_named_with_its_fix(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    run = tmp_path / "run"
    given = flags(world, run, [world / "ppo"], "--judges", "judges:vowels", "judges:broken")
    monkeypatch.setenv("BROKEN_JUDGE", "1")
    assert main(["evaluate", *given]) == 2
    monkeypatch.delenv("BROKEN_JUDGE")
    text = (run / name).read_text()
    for damaged in (text[: len(text) // 3], "".join(text.splitlines(keepends=True)[:-1])):
        (run / name).write_text(damaged)
        capsys.readouterr()
        assert main(["evaluate", *given]) == 2
        error = capsys.readouterr().err
        assert f"{run / name} (" in error and "Remove " in error and "again" in error
    shutil.rmtree((run / name).parent)
    assert main(["evaluate", *given]) == 0 and (run / name).read_text() == text


def test_the_words_of_sampling_end_with_it(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is being done, as it is printed every few seconds, at each call of a judge and each loading of a model."""
    seen: list[str] = []
    score, load = Rewards.each, likelihood.load

    def each(*arguments: Any, **keywords: Any) -> Any:
        seen.append(describe(current()))
        return score(*arguments, **keywords)

    def loading(*arguments: Any) -> Any:
        seen.append(describe(current()))
        return load(*arguments)

    monkeypatch.setattr(Rewards, "each", each)
    monkeypatch.setattr(likelihood, "load", loading)
    given = flags(world, tmp_path / "run", [world / "ppo"], "--judges", "judges:vowels")
    assert main(["evaluate", *given]) == 0
    assert len(seen) == 4 and not [line for line in seen if "answered" in line]
    assert seen[-1].startswith("scoring by judge/vowels: batch, batch 0 of 1")


def test_names_that_are_long_or_have_dots_stay_apart(world: Path, tmp_path: Path) -> None:
    prompts = [json.loads(line)["prompt"] for line in (world / "held.jsonl").read_text().splitlines()]
    rows = "".join(json.dumps({"prompt": one, "completions": ["a fine one"]}) + "\n" for one in prompts)
    names = ["v1.0", "v1.1", "x" * 240, "漢" * 80]
    for name in names:
        (tmp_path / f"{name}.jsonl").write_text(rows)
    shutil.copytree(world / "other", tmp_path / ("y" * 240))
    files = [*(tmp_path / f"{name}.jsonl" for name in names), tmp_path / ("y" * 240)]
    judge = f"{{judges:vowels: {{name: {'n' * 300}}}}}"
    given = flags(world, tmp_path / "run", files, "--start", str(world / "ending"), "--judges", judge)
    assert main(["evaluate", *given]) == 0
    found = figures(tmp_path / "run")
    shown = ["v1.0", "v1.1", *(f"{one * 12}…{one * 12}" for one in "x漢y")]
    assert found["policies"] == shown and found["measures"] == ["judge/" + "n" * 300]


def test_a_judge_that_never_applies_has_no_figures(world: Path, tmp_path: Path) -> None:
    """No prompt has a score: that is no win rate, and not one of 0."""
    given = flags(world, tmp_path / "run", [world / "ppo"], "--judges", "judges:never", "--against", "all")
    assert main(["evaluate", *given, "--bucket", "topic"]) == 0
    found = figures(tmp_path / "run")
    measured = {"prompts": 0, "mean": None, "difference": None, "win_rate": None}
    assert found["figures"]["ppo"]["measures"]["judge/never"] == measured
    assert found["wins"]["judge/never"] == {"ending": {"ppo": None}, "ppo": {"ending": None}}
    assert (tmp_path / "run" / "evaluation.html").is_file()
