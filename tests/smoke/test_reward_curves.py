"""The benchmark of learning curves: its reward model, its comparison by hand, and added sides."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from benchmarks import reward_curves as curves

from apportion.models.reward import load_reward

WORDS = ("a", "the", "in", "of", "and", "good", "bad", "film", "story", "heart", "music", "cast", "jokes", "time")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("curves")
    tiny.save_policy(folder / "model")
    tiny.save_reward(folder / "reward")
    rows = [f"{a} {b} {text}" for a in WORDS for b in WORDS[:5] for text in tiny.TEXTS[:1] if a != b]
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": row}) + "\n" for row in rows))
    return folder


def run(world: Path, monkeypatch: pytest.MonkeyPatch, *words: str) -> Any:
    """Run the benchmark with --output; return the file's contents."""
    output = world / "curves.json"
    inputs = ["--model", world / "model", "--prompts", world / "prompts.jsonl", "--reward_model", world / "reward"]
    flags = [str(word) for word in ("x", *inputs, "--batches", "2", "--threads", "1", "--output", output, *words)]
    monkeypatch.setattr("sys.argv", flags)
    assert curves.main() == 0
    return json.loads(output.read_text())


@pytest.mark.long  # batches of the size that the benchmark has
def test_sides_are_added_to_what_was_run(
    world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    one = run(world, monkeypatch, "--sides", "default", "--seeds", "1")
    assert list(one["curves"]) == ["default"] and len(one["curves"]["default"]["0"]) == 2
    assert all(math.isfinite(score) for score in one["curves"]["default"]["0"])
    two = run(world, monkeypatch, "--sides", "default", "prefix", "--seeds", "1", "--against", "prefix")
    assert two["curves"]["default"] == one["curves"]["default"] and two["cost"]["default"] == one["cost"]["default"]
    assert two["sides"] == {"default": ["default"], "prefix": ["default", "algorithm=red", "optim.lr=0.001"]}
    # a response of 24 tokens each; the KL to itself is that of two ways to compute the same model
    assert all(abs(kl) < 1e-3 for kl in (one["kl"]["default"]["0"][0], two["kl"]["prefix"]["0"][0]))
    assert all(0 < p < 1 for p in two["judge"]["prefix"]["0"])
    # the same seed: the first batch is sampled before anything is learned
    assert two["curves"]["prefix"]["0"][0] == pytest.approx(one["curves"]["default"]["0"][0], abs=1e-4)
    assert two["cost"]["prefix"]["0"]["batch_s"] > 0 and two["cost"]["prefix"]["0"]["peak_mb"] > 50
    named = run(world, monkeypatch, "--sides", "mine", "--against", "default", "--seeds", "1",
                "--variant", "mine", "algorithm=ppo", "optim.eps=1e-8")  # fmt: skip
    assert named["sides"]["mine"] == ["default", "algorithm=ppo", "optim.eps=1e-8"]
    assert len(named["curves"]["mine"]["0"]) == 2 and named["curves"]["prefix"] == two["curves"]["prefix"]
    ends = [sum(two["curves"][side]["0"]) / 2 for side in ("default", "prefix")]
    assert two["compared"]["default"]["difference"]["mean"] == pytest.approx(ends[0] - ends[1])
    assert "default − prefix" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="holds curves of"):
        run(world, monkeypatch, "--sides", "prefix", "--adapters_lr", "0.5")


def test_the_comparison_by_hand() -> None:
    ours = {"0": [0.0] * 5 + [2.0] * 5, "1": [0.0] * 9 + [5.0]}
    theirs = {"0": [1.0] * 10, "1": [0.5] * 10, "2": [9.0] * 10}
    flat = {side: {seed: [0.5] * 10 for seed in "012"} for side in ("full", "peer")}
    found = curves.compared({"curves": {"full": ours, "peer": theirs}, "kl": flat, "judge": flat}, "peer")
    assert found["end"]["full"] == {"0": 2.0, "1": 1.0}
    # differences 1 and 0.5: mean 0.75, sd 0.3536, t(1) = 12.706: half 12.706 · 0.3536/√2
    half = 12.706 * 0.35355339 / math.sqrt(2)
    expected = {"mean": 0.75, "low": 0.75 - half, "high": 0.75 + half}
    assert found["full"]["difference"] == pytest.approx(expected)
    # the mean of the last five reaches 1.0 with three 2.0s in it, and 0.5 with the 5.0
    assert found["full"]["batches_to_reach"] == [8, 10]
    assert curves.first([0.0] * 10, 0.1) is None


def test_the_judge_at_the_same_kl_by_hand() -> None:
    # running means of 5: KL 2, 3, 4 with judge .5, .6, .7; KL 1, 2, 3 with judge .5, .55, .6: both reach 3
    fast, slow = [2.0] * 5 + [7.0, 7.0], [1.0] * 5 + [6.0, 6.0]
    quick, late = [0.5] * 5 + [1.0, 1.0], [0.5] * 5 + [0.75, 0.75]
    level, one, other = curves.judge_at_kl([fast, slow], [quick, late])
    assert (level, one, other) == pytest.approx((3.0, 0.6, 0.6))
    # 2.5 is half way between the means 2 and 3
    level, one, other = curves.judge_at_kl([fast, [2.5] * 7], [quick, late])
    assert (level, one, other) == pytest.approx((2.5, 0.55, 0.5))


def test_faulty_sides_are_named(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit, match="--sides: nothing; expected one of default"):
        run(world, monkeypatch, "--sides", "nothing")
    with pytest.raises(SystemExit, match="--variant peer-x: .*expected lr="):
        run(world, monkeypatch, "--sides", "peer-x", "--variant", "peer-x", "optim.lr=1e-3")
    with pytest.raises(SystemExit, match="--variant mine: .*expected settings of apportion rl"):
        run(world, monkeypatch, "--sides", "mine", "--variant", "mine", "fast")


@pytest.mark.parametrize("labels", [1, 2])
def test_the_one_label_is_the_score(tmp_path: Path, labels: int) -> None:
    folder = tiny.save_reward(tmp_path / "reward", labels=labels)
    before = load_reward(str(folder), device="cpu")
    after = load_reward(str(curves.one_label(str(folder), tmp_path / "one")), device="cpu")
    ids, mask = torch.randint(3, 400, (4, 9)), torch.ones(4, 9, dtype=torch.bool)
    assert after.model.config.num_labels == 1
    assert torch.allclose(after.score(ids, mask)[0], before.score(ids, mask)[0], atol=1e-6)


def test_each_side_has_its_rate() -> None:
    options = argparse.Namespace(lr=1e-4, adapters_lr=2e-3)
    found = {name: curves.settings_of(side, options)[-1] for name, side in curves.SIDES.items()}
    ours = {"default": "default", "adapters": "optim.lr=0.002", "prefix": "optim.lr=0.002"}
    ours |= {"full": "optim.lr=0.0001", "full16": "optim.lr=0.0001"}
    assert found == ours | {"peer": "lr=0.0001", "peer16": "lr=0.0001", "peer_as_is": "peer"}
