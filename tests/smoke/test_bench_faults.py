"""`benchmarks.faults` and `benchmarks.soak`: five real kills, and the sensitivity of their comparisons."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
from benchmarks import soak as soaking
from benchmarks.faults.__main__ import main as faults_main
from benchmarks.faults.compare import difference, traces
from benchmarks.faults.harness import clear, enough, plans
from benchmarks.faults.kills import UnexpectedEnd
from benchmarks.faults.settings import FaultsConfig, SoakConfig
from benchmarks.soak import growth
from commands import Server
from scripts import run_benchmark

QUICK = ("--kills", "3", "--model_kills", "0", "--steps", "8", "--checkpoint_every", "2")


def test_three_kills_change_nothing(heavy: Server, tmp_path: Path) -> None:
    tiny.tokenizer().save_pretrained(tmp_path / "tokenizer")
    # in a process of its own: it forks, which a process with threads should not
    flags = ["--tokenizer", tmp_path / "tokenizer", "--json", "--out", tmp_path / "result.json"]
    done = run_benchmark("faults", *QUICK, *flags, folder=tmp_path, heavy=heavy)
    assert done.code == 0, done.err
    result = json.loads(done.out)
    assert result == json.loads((tmp_path / "result.json").read_text())
    assert (
        result["kills"] == result["bit_identical"] == 3 and result["log_rows_lost"] == result["log_rows_doubled"] == 0
    )
    assert result["kills_in_checkpoint"] >= 1 and result["resumed_from_checkpoint"] >= 1
    assert len(result["reference_sha256"]) == 64 and set(result["kinds"]) == {"adapters", "all weights"}
    one, two = (result["kinds"][kind] for kind in ("adapters", "all weights"))
    assert one["weights"] != two["weights"] and one["logs"] != two["logs"]


def test_plans_cover_every_kind_and_aim_a_fraction_at_checkpoints() -> None:
    made = plans(FaultsConfig(), Path())
    kinds = [plan.kind for plan in made]
    assert len(made) == 50 and kinds.count("smollm2") == 3 and kinds.count("adapters") - kinds.count("all weights") == 1
    assert sum(plan.aimed for plan in made) == 15 and len({plan.seed for plan in made}) == 50
    assert all(plan.aimed for plan in plans(FaultsConfig(in_checkpoint=1.0), Path()))


def test_earlier_runs_are_cleared(tmp_path: Path) -> None:
    for name in ("whole-adapters", "kill-3", "mine", "kill-notes"):
        (tmp_path / name).mkdir()
    for name in ("whole-adapters", "kill-3", "mine"):
        (tmp_path / name / "status.json").write_text("{}")
    (tmp_path / "world" / "policy").mkdir(parents=True)
    (tmp_path / "world" / "policy" / "config.json").write_text("{}")
    clear(tmp_path, "world", "whole-*", "kill-*")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["kill-notes", "mine"]


@pytest.mark.parametrize(("hit", "resumed", "expected"), [(2, 5, True), (1, 9, False), (5, 4, False)])
def test_enough_kills_hit_checkpoints_and_resumed(hit: int, resumed: int, expected: bool) -> None:
    assert enough({"kills": 10, "kills_in_checkpoint": hit, "resumed_from_checkpoint": resumed}) == expected


class Finished:
    """A process that has ended already: another's run."""

    pid, began = os.getpid(), 0.0

    def __init__(self, words: list[str], output: Path, **more: Any) -> None:
        run = Path(words[words.index("--output") + 1])
        run.mkdir()
        (run / "metrics.jsonl").write_text('{"step": 1, "memory/rss_mb": 1.0}\n')

    def poll(self) -> int:
        return 0

    wait = poll


def test_a_soak_of_a_finished_run_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.tokenizer().save_pretrained(tmp_path / "tokenizer")
    monkeypatch.setattr(soaking, "Process", Finished)
    config = SoakConfig(batches=2, judge_after=1, tokenizer=str(tmp_path / "tokenizer"), folder=str(tmp_path / "soak"))
    with pytest.raises(UnexpectedEnd, match="1 of 2 batches and was sampled 0 times"):
        soaking.soak(config)


@pytest.fixture
def folder(tmp_path: Path) -> Callable[..., Path]:
    """Return a maker of finished runs by their metrics, rollouts and weights."""

    def make(name: str, steps: list[int], rows: list[tuple[int, int]], weights: bytes, **more: Any) -> Path:
        path = tmp_path / name
        (path / "final").mkdir(parents=True)
        (path / "final" / "model.safetensors").write_bytes(weights)
        lines = [{"step": s, "objective/kl": 0.5 * s, "time/total": len(name)} | more for s in steps]
        (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        texts = [{"step": s, "row": r, "text": "a\u2028b"} for s, r in rows]
        (path / "rollouts.jsonl").write_text("".join(json.dumps(t, ensure_ascii=False) + "\n" for t in texts))
        return path

    return make


def test_differences_are_reported(folder: Callable[..., Path]) -> None:
    rows = [(1, 0), (1, 1), (2, 0)]
    one = traces(folder("one", [1, 2], rows, b"w"))
    assert difference(one, traces(folder("same", [1, 2], rows, b"w"))) == {
        "weights": True,
        "logs": True,
        "rows_lost": 0,
        "rows_doubled": 0,
    }
    other = difference(one, traces(folder("other", [1, 2], rows, b"v")))
    assert not other["weights"] and other["logs"]
    doubled = difference(one, traces(folder("doubled", [1, 2, 2], rows, b"w")))
    assert doubled == {"weights": True, "logs": False, "rows_lost": 0, "rows_doubled": 1}
    lost = difference(one, traces(folder("lost", [2], rows[1:], b"w")))
    assert lost == {"weights": True, "logs": False, "rows_lost": 2, "rows_doubled": 0}
    value = difference(one, traces(folder("value", [1, 2], rows, b"w", **{"loss/policy": 1.0})))
    assert not value["logs"] and value["rows_lost"] == 0


def test_growth_is_seen_through_noise() -> None:
    def rows(slope: float) -> list[dict[str, float]]:
        return [{"step": i, "memory/rss_mb": 500 + slope * i + 3 * (-1) ** i} for i in range(1, 1001)]

    flat, grows = growth(rows(0.0), [(i, 9) for i in range(1000)], 200), growth(rows(0.02), [(500, 9), (900, 12)], 200)
    assert abs(flat["memory_growth"]) < 1e-9 and flat["handles"]["most"] == 9
    assert grows["memory_growth"] == pytest.approx(0.02 * 720 / (500 + 0.02 * 240.5), rel=1e-3)
    assert grows["memory_slope_mb_per_1000"] == pytest.approx(20, rel=1e-2)
    assert grows["handles"]["median_first_half"] == 9 and grows["handles"]["median_second_half"] == 12


@pytest.mark.parametrize(
    ("words", "piece"),
    [
        (["faults", "--kills", "0"], "kills: got 0"),
        (["faults", "--kills", "2"], "model_kills: got 3"),
        (["faults", "--tokenizer", "mine"], "tokenizer: got 'mine'"),
        (["faults", "--steps", "3"], "checkpoint_every: got 3"),
        (["faults", "--in_checkpoint", "2"], "in_checkpoint: got 2"),
        (["faults", "--fresh"], "--fresh"),
        (["faults", "--jobs", "many"], "many"),
        (["soak", "--batches", "300"], "batches: got 300"),
    ],
)
def test_bad_settings_are_named(words: list[str], piece: str, capsys: pytest.CaptureFixture[str]) -> None:
    run = {"faults": faults_main, "soak": soaking.main}[words[0]]
    try:
        code = run(words[1:])
    except SystemExit as end:  # of the parser
        code = end.code
    assert code == 2 and piece in capsys.readouterr().err


@pytest.mark.long
def test_a_short_soak(tmp_path: Path) -> None:
    tiny.tokenizer().save_pretrained(tmp_path / "tokenizer")
    flags = ["--batches", 300, "--judge_after", 100, "--tokenizer", tmp_path / "tokenizer", "--json"]
    done = run_benchmark("soak", *flags, folder=tmp_path)
    result = json.loads(done.out)
    assert result["batches"] == 300 and result["handles"]["least"] > 0
