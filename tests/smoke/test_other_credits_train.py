"""Two steps of a real run with each credit that is neither attention nor a plain spread, and what it logs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_runs

from apportion.stages.rl.train import train

CREDITS: dict[str, tuple[str, list[str]]] = {
    "prefix_difference": ("{prefix_difference: {initial: omit}}", ["credit/prefix_gap"]),
    "attribution": ("attribution", ["credit/against_rate", "credit/share_entropy"]),
    "shapley": ("{shapley: {spans: 2, budget: 8}}", ["credit/shapley_error", "credit/shapley_calls"]),
    "implicit": ("{implicit: {model: MODEL}}", ["credit/implicit", "credit/implicit_clipfrac"]),
    "process": ("{process: {function: 'some_rewards:halves', keep: true}}", ["credit/process"]),
    "length_penalty": ("[sparse, {length_penalty: {target: 2, limit: 5}}, kl_penalty]", ["credit/length_cost"]),
}


@pytest.mark.parametrize("name", CREDITS)
def test_two_steps(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = tiny_runs.world(tmp_path / "world")
    tiny.save_policy(world / "dpo", seed=4)
    own = "def halves(texts, rollouts, prompts):\n    return [[0.5] * int(n) for n in rollouts.mask.sum(dim=1)]\n"
    (tmp_path / "some_rewards.py").write_text(own)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "some_rewards", raising=False)
    spec, reported = CREDITS[name]
    changes: dict[str, Any] = {"credit": spec.replace("MODEL", f"'{world / 'dpo'}'"), "algorithm": "ppo"}
    run = train(tiny_runs.config(world, tmp_path / "run", **changes))
    steps = tiny_runs.read_lines(run.path / "metrics.jsonl")
    assert len(steps) == 2 and all(key in step for step in steps for key in reported)
    if name == "process":
        assert steps[0]["credit/process"] == pytest.approx(2.5)  # halves of five tokens
    if name == "length_penalty":
        assert steps[0]["credit/length_cost"] == pytest.approx(0.01)  # full at the limit of five
    if name == "shapley":
        assert 4 <= steps[0]["credit/shapley_calls"] <= 8
