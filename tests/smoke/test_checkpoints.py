"""Checkpoints of real tiny runs: a resumed run is bitwise equal to the uninterrupted one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_runs
import torch
from safetensors.torch import load_file

from apportion.cli.main import main
from apportion.stages.method import build_method
from apportion.stages.rl.learner import make_learner
from apportion.stages.rl.train import train
from apportion.training.checkpoint import load_latest, save_checkpoint
from apportion.training.run_folder import RunFolder

MACHINE = ("time/", "memory/")  # metrics that say how fast and how large, not what
ADAPTIVE = "[attention: {mix: 0.7}, kl_penalty: {coef: 0.1, target: 0.5, horizon: 20}]"


class Interrupted(Exception):
    """What a test raises in the middle of a run, as a lost connection or a signal would."""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_runs.world(tmp_path_factory.mktemp("world"))


def settings(world: Path, output: Path, **changes: Any) -> Any:
    more = {"steps": 5, "checkpoint_every": 2, "credit": ADAPTIVE, "sampling.stop": "eos", "policy": world / "ending"}
    return tiny_runs.config(world, output, **more | changes)


@pytest.fixture(scope="module")
def uninterrupted(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., RunFolder]:
    """Return a function (**changes) -> the finished run, trained once for each combination of settings."""
    runs: dict[str, RunFolder] = {}

    def get(**changes: Any) -> RunFolder:
        key = repr(changes)
        if key not in runs:
            runs[key] = train(settings(world, tmp_path_factory.mktemp("uninterrupted") / "run", **changes))
        return runs[key]

    return get


def stop_after(last: int) -> Any:
    def on_step(step: int, steps: int, metrics: dict[str, float]) -> None:
        if step == last:
            raise Interrupted

    return on_step


def metrics(path: Path) -> list[dict[str, float]]:
    rows = tiny_runs.read_lines(path / "metrics.jsonl")
    return [{k: v for k, v in row.items() if not k.startswith(MACHINE)} for row in rows]


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {f"{f.stem}/{k}": v for f in sorted(folder.glob("*.safetensors")) for k, v in load_file(f).items()}


def assert_equal(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> None:
    assert one.keys() == two.keys() and one
    for name in one:
        assert one[name].dtype == two[name].dtype and torch.equal(one[name], two[name]), name


@pytest.mark.parametrize(
    "changes",
    [
        {"lora.rank": 4},
        {"lora.rank": 0},
        {"lora.rank": 4, "ppo.value_model": "separate"},
        {"lora.rank": 4, "dtype": "bfloat16"},
        {"lora.rank": 0, "dtype": "bfloat16", "ppo.value_model": "separate"},
        {"lora.rank": 0, "dtype": "bfloat16", "optim.moments": "bfloat16"},
    ],
    ids=["adapters", "all weights", "separate values", "16-bit base", "float32 masters", "16-bit moments"],
)
@pytest.mark.parametrize("last", [3, pytest.param(1, marks=pytest.mark.long)])
def test_an_interrupted_run_ends_as_the_uninterrupted_one(
    world: Path, tmp_path: Path, uninterrupted: Callable[..., RunFolder], changes: dict[str, Any], last: int
) -> None:
    """Interrupted between two checkpoints, or before the first: weights, optimizer, randomness, κ and logs."""
    whole = uninterrupted(**changes)
    with pytest.raises(Interrupted):
        train(settings(world, tmp_path / "parts", **changes), on_step=stop_after(last))
    assert len(metrics(tmp_path / "parts")) == last, (
        "what was logged after the last checkpoint is truncated when it is resumed"
    )
    torch.manual_seed(12345)
    torch.rand(7)  # another process would have another state here
    parts = train(settings(world, tmp_path / "parts", **changes))
    assert metrics(whole.path) == metrics(parts.path) and [m["step"] for m in metrics(parts.path)] == [1, 2, 3, 4, 5]
    assert tiny_runs.read_lines(whole.path / "rollouts.jsonl") == tiny_runs.read_lines(parts.path / "rollouts.jsonl")
    assert_equal(tiny_runs.weights(whole.path / "final"), tiny_runs.weights(parts.path / "final"))
    for step in (2, 4):
        folders = [run.path / "checkpoints" / f"step-{step}" for run in (whole, parts)]
        assert_equal(*(tensors(folder) for folder in folders))


def test_a_run_resumed_twice_is_still_the_same(
    world: Path, tmp_path: Path, uninterrupted: Callable[..., RunFolder]
) -> None:
    whole = uninterrupted()
    for last in (2, 3, 4):
        with pytest.raises(Interrupted):
            train(settings(world, tmp_path / "parts"), on_step=stop_after(last))
    parts = train(settings(world, tmp_path / "parts"))
    assert metrics(whole.path) == metrics(parts.path)
    assert_equal(tiny_runs.weights(whole.path / "final"), tiny_runs.weights(parts.path / "final"))


@pytest.mark.parametrize("algorithm", ["grpo", "abc-rloo", "reinforce++-baseline", "vineppo", "abc-ma"])
def test_every_kind_of_algorithm_resumes_and_repeats_from_its_saved_settings(
    world: Path, tmp_path: Path, algorithm: str
) -> None:
    """Bit for bit, nothing learned by a critic that is not there; config.yaml holds what was left to the method."""
    changes = {
        "algorithm": algorithm,
        "sampling.batch_size": 8,
        "optim.weight_decay": 0.1,
        "steps": 4,
        "credit": "null",
    }
    whole = train(settings(world, tmp_path / "whole", **changes))
    with pytest.raises(Interrupted):
        train(settings(world, tmp_path / "parts", **changes), on_step=stop_after(3))
    parts = train(settings(world, tmp_path / "parts", **changes))
    stored = str(whole.path / "config.yaml")
    assert main(["rl", "--config", stored, "--output", str(tmp_path / "again")]) == 0
    assert main(["rl", "--config", stored]) == 0  # the same settings in the same folder: left alone
    for other in (parts.path, tmp_path / "again"):
        assert metrics(whole.path) == metrics(other)
        assert_equal(tiny_runs.weights(whole.path / "final"), tiny_runs.weights(other / "final"))


def test_a_finished_run_is_left_alone(world: Path, tmp_path: Path) -> None:
    run = train(settings(world, tmp_path / "run"))
    before = {p: p.stat().st_mtime_ns for p in run.path.rglob("*") if p.is_file()}
    again = train(settings(world, tmp_path / "run"), on_step=stop_after(1))
    assert again.finished and {p: p.stat().st_mtime_ns for p in run.path.rglob("*") if p.is_file()} == before


def test_a_checkpoint_holds_weights_moments_controller_and_randomness(
    uninterrupted: Callable[..., RunFolder],
) -> None:
    run = uninterrupted()
    folder = run.path / "checkpoints" / "step-4"
    assert {p.name for p in folder.iterdir()} == {
        "weights.safetensors",
        "optimizer.safetensors",
        "state.safetensors",
        "monitors.safetensors",
        "progress.json",
        "manifest.json",
        "random.safetensors",
    }
    count = len(load_file(folder / "weights.safetensors"))
    moments = load_file(folder / "optimizer.safetensors")
    assert {name.split(".")[1] for name in moments} == {"step", "exp_avg", "exp_avg_sq"} and len(moments) == 3 * count
    assert moments["0.step"].item() == 4 * 2 * 2  # steps × epochs × mini-batches
    state = load_file(folder / "state.safetensors")
    assert state["generator"].dtype == torch.uint8 and len(state) == 2
    [coefficient] = [v for k, v in state.items() if k != "generator"]
    logged = metrics(run.path)
    assert float(coefficient) == pytest.approx(logged[3]["kl/coef"], rel=1e-6) and float(coefficient) != 0.1
    progress = json.loads((folder / "progress.json").read_text())
    assert progress["step"] == 4
    cut = (run.path / "metrics.jsonl").read_bytes()[: progress["logs"]["metrics.jsonl"]["size"]]
    assert cut.count(b"\n") == 4 and cut.endswith(b"}\n")


def test_old_checkpoints_are_pruned_and_half_written_ones_ignored(world: Path, tmp_path: Path) -> None:
    changes = {"steps": 6, "checkpoint_every": 1, "keep_checkpoints": 2}
    with pytest.raises(Interrupted):
        train(settings(world, tmp_path / "run", **changes), on_step=stop_after(4))
    folder = tmp_path / "run" / "checkpoints"
    assert sorted(p.name for p in folder.iterdir()) == ["step-3", "step-4"]
    # what a killed process may leave: a newer one under its temporary name, and one without its last file
    (folder / "step-9.tmp").mkdir()
    (folder / "step-9.tmp" / "weights.safetensors").write_bytes(b"half")
    (folder / "step-8").mkdir()
    (folder / "step-8" / "weights.safetensors").write_bytes(b"half")
    steps: list[int] = []
    train(settings(world, tmp_path / "run", **changes), on_step=lambda step, total, found: steps.append(step))
    assert steps == [5, 6]
    assert {"step-4", "step-5"} <= {p.name for p in folder.iterdir()}, "the last step leaves final/, no checkpoint"


def test_more_than_nine_checkpoints_are_ordered_by_number(world: Path, tmp_path: Path) -> None:
    changes = {"steps": 12, "checkpoint_every": 1, "keep_checkpoints": 3, "ppo.epochs": 1}
    run = train(settings(world, tmp_path / "run", **changes))
    assert sorted(p.name for p in (run.path / "checkpoints").iterdir()) == ["step-10", "step-11", "step-9"]


def test_loading_restores_exactly_what_was_saved(world: Path, tmp_path: Path) -> None:
    config = settings(world, tmp_path / "run")
    with pytest.raises(Interrupted):
        train(config, on_step=stop_after(3))
    learner = make_learner(config, build_method(config))
    start = learner.generator.get_state()
    run = RunFolder(tmp_path / "run", "rl")
    assert load_latest(run, learner) == 2
    assert not torch.equal(learner.generator.get_state(), start)
    stored = tensors(run.path / "checkpoints" / "step-2")
    again = save_checkpoint(RunFolder(tmp_path / "copy", "rl"), learner, 2, keep=1)
    assert_equal(stored, tensors(again))
    assert len(metrics(run.path)) == 2


def test_without_a_checkpoint_a_run_starts_over(world: Path, tmp_path: Path) -> None:
    config = settings(world, tmp_path / "run", checkpoint_every=0)
    with pytest.raises(Interrupted):
        train(config, on_step=stop_after(3))
    steps: list[int] = []
    run = train(config, on_step=lambda step, total, found: steps.append(step))
    assert steps == [1, 2, 3, 4, 5] and [m["step"] for m in metrics(run.path)] == steps
    assert not (run.path / "checkpoints").exists()
