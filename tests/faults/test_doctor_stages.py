"""`apportion doctor --stage sft, dpo and label`: what is right, and what each check finds wrong."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trainer_runs

from apportion.cli.main import main


@pytest.fixture(scope="module")
def trainers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trainer_runs.world(tmp_path_factory.mktemp("trainers"))


@pytest.fixture
def doctor(
    trainers: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, dict[str, tuple[str, str, str]]]]:
    """Return a function that checks a run of `stage` and returns (exit code, {check: (level, message, fix)})."""

    def run(stage: str, data: Any, **changes: Any) -> tuple[int, dict[str, tuple[str, str, str]]]:
        if isinstance(data, list):
            data = trainer_runs.write(tmp_path / f"{len(list(tmp_path.iterdir()))}.jsonl", data)
        if stage == "label":
            given = {"data": data, "database": tmp_path / "labels.db", "port": 0} | changes
            words = [str(word) for name, value in given.items() for word in (f"--{name}", value)]
        else:
            words = trainer_runs.flags(trainers, data, tmp_path / "run", **{"held_out": 0.2} | changes)
        capsys.readouterr()
        code = main(["doctor", "--stage", stage, "--json", *words])
        found = json.loads(capsys.readouterr().out)
        assert found["stage"] == stage and found["passed"] == (code == 0)
        return code, {one["name"]: (one["level"], one["message"], one["fix"]) for one in found["findings"]}

    return run


@pytest.mark.parametrize(("stage", "data"), [("sft", "demonstrations"), ("dpo", "pairs")])
def test_a_run_that_is_right_passes_every_check(doctor: Any, trainers: Path, stage: str, data: str) -> None:
    code, found = doctor(stage, trainers / f"{data}.jsonl", epochs=4)
    assert code == 0 and {level for level, _, _ in found.values()} == {"ok"}, found
    assert "0 of" in found["repeated rows"][1] and "GB free" in found["memory"][1]
    rows = [int(word) for word in found["rows"][1].split() if word.isdigit()]
    assert sum(rows) == 30 and rows[1] > 0
    assert f"{-(-rows[0] // 8) * 4} optimizer steps of 8 rows, 4 passes" in found["steps"][1]
    if stage == "dpo":
        assert f"shorter in {rows[0]}" in found["targets"][1]


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_each_mistake_of_a_trainer_s_run_is_found(doctor: Any, trainers: Path, tmp_path: Path, stage: str) -> None:
    rows = trainer_runs.demonstrations() if stage == "sft" else trainer_runs.pairs()
    code, found = doctor(stage, rows[:4] * 3, held_out=0)
    level, message, _ = found["repeated rows"]
    assert code == 0 and (level, message[:7]) == (("warn", "8 of 12") if stage == "sft" else ("ok", "0 of 4 "))
    assert found["rows"][0] == "warn" and "held_out" in found["rows"][2] and found["steps"][0] == "warn"
    test = trainer_runs.write(tmp_path / "test.jsonl", rows[:3])
    code, found = doctor(stage, rows, test_data=test)
    assert code == 2 and found["repeated rows"][0] == "fail" and "3 of 3 held-out" in found["repeated rows"][1]
    code, found = doctor(stage, [{"prompt": "x"}])
    assert code == 2 and found["rows"][0] == "fail" and found["steps"][0] == "skip"
    code, found = doctor(stage, rows, model=tmp_path / "absent")
    assert code == 2 and found["model"][0] == "fail" and "check the path" in found["model"][2]
    low = int(doctor(stage, rows)[1]["row tokens"][1].split()[0])
    cut = low - (3 if stage == "sft" else 7)  # of a pair also the shorter answer, which is the chosen one
    code, found = doctor(stage, rows, max_length=cut, overlong="truncate")
    assert found["targets"][0] == "warn" and "--max_length" in found["targets"][2]
    if stage == "dpo":
        code, found = doctor(stage, rows, loss="ipo", label_smoothing=0.1)
        assert code == 2 and found["loss"][0] == "fail"


def items(count: int = 120, answers: int = 3) -> list[dict[str, Any]]:
    return [
        {"prompt": f"Film {i}", "completions": [f"Answer {k} to {i}." for k in range(answers)]} for i in range(count)
    ]


def test_a_study_that_is_right_passes_every_check(doctor: Any, tmp_path: Path) -> None:
    text = tmp_path / "guidelines.md"
    text.write_text("Prefer what is true.")
    code, found = doctor("label", items(), guidelines=text)
    assert code == 0 and {level for level, _, _ in found.values()} == {"ok"}, found
    assert "120 items of 3 to 3 answers" in found["items"][1] and "132 rankings in all" in found["overlap"][1]
    assert not (tmp_path / "labels.db").exists()


def test_each_mistake_of_a_study_is_found(doctor: Any, tmp_path: Path) -> None:
    rows = items(4, 9)
    rows[0]["completions"][:2] = ["same", "same"]
    rows[1]["completions"][0] = "long " * 2000
    code, found = doctor("label", rows)
    assert code == 0 and all(found[name][0] == "warn" for name in ("items", "guidelines", "overlap"))
    assert all(piece in found["items"][1] for piece in ("two equal answers", "more than 8", "longer than 4000"))
    code, found = doctor("label", [{"prompt": "x", "completions": ["one"]}])
    assert code == 2 and found["items"][0] == "fail" and "2 to 12 answers" in found["items"][1]
    code, found = doctor("label", items(), host="0.0.0.0")
    assert code == 2 and found["access"][0] == "fail" and found["port"][0] == "skip"
    code, found = doctor("label", items(), host="0.0.0.0", token="x" * 20)
    assert code == 0 and found["access"][0] == "warn" and "unencrypted" in found["access"][1]
    code, found = doctor("label", items(), annotators="[ann]", database=tmp_path / "no" / "labels.db")
    assert code == 2 and found["overlap"][0] == "fail" and found["database"][0] == "fail"
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        code, found = doctor("label", items(), port=taken.getsockname()[1])
    assert code == 2 and found["port"][0] == "fail"


def test_flags_of_another_stage_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--stage", "dpo", "--labels", "x.csv"]) == 2
    assert "nothing with --stage dpo" in capsys.readouterr().err
    assert main(["doctor", "--stage", "sftt"]) == 2
    assert "Did you mean 'sft'" in capsys.readouterr().err
