"""Two processes and one: the same gradients, statistics, controllers, weights and run folder; one error ends both."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import parallel_worker
import pytest
import tiny_runs
import torch
from commands import Server
from faulty import METHODS
from two_processes import ACCELERATE, MACHINE, REPO, SUPPORT, differences, launch, run_pair

from apportion.cli.main import main
from apportion.distributed import collectives
from apportion.distributed.launch import check_launch
from apportion.errors import ConfigError
from apportion.stages.reward import train as reward
from apportion.stages.rl.sources import check_shares

RECIPE = REPO / "recipes" / "accelerate" / "ddp_cpu.yaml"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_runs.world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def out(world: Path, heavy: Server, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of what two processes did: `parallel_worker.run`."""
    out = tmp_path_factory.mktemp("two")
    run_pair(heavy, "parallel_worker.py", world, out, folder=out)
    return out


@pytest.fixture(scope="module")
def ranks(out: Path) -> list[dict[str, Any]]:
    return [torch.load(out / f"rank-{i}.pt", weights_only=True) for i in (0, 1)]


@pytest.mark.parametrize("case", parallel_worker.CASES)
def test_two_processes_take_the_steps_of_one(
    world: Path, ranks: list[dict[str, Any]], case: str, tmp_path: Path
) -> None:
    one = parallel_worker.trace(world, tmp_path, parallel_worker.CASES[case])
    assert differences(one, ranks[0][case], ranks[1][case]) == []


def test_controller_saw_the_whole_batch(world: Path, ranks: list[dict[str, Any]]) -> None:
    start = 0.1
    moved = {name: float(v) for name, v in ranks[0]["gae"]["state"].items()}
    assert moved and all(v != pytest.approx(start) for v in moved.values())


def test_processes_leave_out_the_same_mini_batches(ranks: list[dict[str, Any]]) -> None:
    taken = {len(rank["masked"]["gradients"]) for rank in ranks}
    assert len(taken) == 1 and 2 < min(taken) < 2 * 2 * 3, "no mini-batch was without a token that counts"


def test_reductions_and_gathering(ranks: list[dict[str, Any]]) -> None:
    one = parallel_worker.reductions()
    for found in (r["reductions"] for r in ranks):
        torch.testing.assert_close(found["white"], one["white"], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(found["mean"], one["mean"])
        assert torch.equal(found["mask"], one["mask"]) and found["mask"].dtype == torch.bool
    ragged = ranks[1]["reductions"]["ragged"]  # rows 0-2 came with 3 columns, rows 3-6 with 4
    assert ragged.shape == (7, 4) and (ragged[:3, 0] == 9).all() and not (ragged[3:] == 9).any()
    assert [r["main"] for r in ranks] == [0, 0]


def test_evidence_that_fails_in_one_process_is_left_out_in_all(ranks: list[dict[str, Any]]) -> None:
    assert [batch["compare/left_out"] for rank in ranks for batch in rank["columns"]["metrics"]] == [1.0] * 4


def test_processes_skip_an_update_together(ranks: list[dict[str, Any]]) -> None:
    alone = parallel_worker.skips()
    assert alone["told"] == [False, True, False] and alone["total"] == 3
    assert "loss of 2 updates in a row (monitors.max_skipped): got nan" in alone["error"]
    assert [rank["skips"] for rank in ranks] == [alone, alone]


def test_reward_model_of_two_processes_is_that_of_one(world: Path, out: Path) -> None:
    one = reward.train(parallel_worker.rewarded(world, out / "reward-of-one")).path
    assert_near(out / "reward", one, steps=6)


def assert_near(two: Path, one: Path, *, steps: int, tolerance: float = 1e-4) -> None:
    """Assert that the metrics and the final weights of two run folders differ by rounding only."""
    mine, theirs = (tiny_runs.read_lines(path / "metrics.jsonl") for path in (one, two))
    assert len(mine) == len(theirs) == steps
    for expected, row in zip(mine, theirs, strict=True):
        assert expected.keys() == row.keys()
        for name in (n for n in expected if not n.startswith(MACHINE)):
            assert row[name] == pytest.approx(expected[name], rel=tolerance, abs=tolerance / 50), name
    weights, reference = (tiny_runs.weights(path / "final") for path in (two, one))
    assert weights.keys() == reference.keys()
    assert all(torch.allclose(weights[name], reference[name], atol=tolerance / 10) for name in reference)


def test_an_error_in_one_process_ends_all_with_one_message_and_the_run_resumes(
    world: Path, heavy: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With `accelerate launch`, resumed without it; the resumed run is the one folder that one process would write."""
    switch = tmp_path / "down"
    switch.touch()
    credit = "[process: {function: reward_functions:failing, keep: true}, kl_penalty: {coef: 0.1, target: 1.0}]"
    settings = {"credit": credit, "steps": 3, "checkpoint_every": 1, "compare": "[sparse]"}
    settings |= {"policy": world / "ending", "sampling.stop": "eos"}
    flags = tiny_runs.flags(world, tmp_path / "two", **settings)
    words = [*ACCELERATE, "--config_file", RECIPE, "-m", "apportion", "rl", *flags]
    done = launch(words, FAIL_WHILE=str(switch))
    assert done.returncode != 0
    assert done.stderr.count("apportion: ") == 1
    assert done.stderr.count("RuntimeError: the reward service is down") == 1
    assert "apportion: process 1: reward_functions:failing: got" in done.stderr
    dump = tmp_path / "two" / "stopped" / "step-2-process-1"  # each process has its own rollouts until it is scored
    assert len(tiny_runs.read_lines(dump / "rollouts.jsonl")) == 3 and f"The rollouts are in {dump}." in done.stderr
    assert "reward_functions.py" in (dump / "traceback.txt").read_text()
    status = json.loads((tmp_path / "two" / "status.json").read_text())
    assert status["status"] == "failed" and "the reward service is down" in status["error"]
    assert len(tiny_runs.read_lines(tmp_path / "two" / "metrics.jsonl")) == 1
    switch.unlink()
    both = heavy.pair("rl", *flags, cwd=tmp_path, PYTHONPATH=str(SUPPORT), FAIL_WHILE=str(switch))
    assert [done.code for done in both] == [0, 0], [done.err for done in both]
    assert [done.out.split() for done in both] == [[str(tmp_path / "two")], []]
    monkeypatch.setenv("FAIL_WHILE", str(switch))
    assert main(["rl", *tiny_runs.flags(world, tmp_path / "one", **settings)]) == 0
    assert_near(tmp_path / "two", tmp_path / "one", steps=3, tolerance=1e-3)
    one, two = (tiny_runs.read_lines(tmp_path / name / "rollouts.jsonl") for name in ("one", "two"))
    place = ("step", "row", "response_ids")
    assert [[row[name] for name in place] for row in two] == [[row[name] for name in place] for row in one]
    assert json.loads((tmp_path / "two" / "status.json").read_text())["status"] == "finished"


def test_an_estimator_that_leaves_one_process_ends_all(world: Path, heavy: Server, tmp_path: Path) -> None:
    """Every process estimates the whole batch: the others must not wait for the gradient of one that left."""
    (tmp_path / "methods.py").write_text(METHODS)
    settings = {"advantages": "{'methods:estimate': {how: elsewhere}}", "compare": "[sparse]"}
    flags = tiny_runs.flags(world, tmp_path / "two", **settings)
    both = heavy.pair("rl", *flags, cwd=tmp_path, PYTHONPATH=str(tmp_path))
    err = "".join(done.err for done in both)
    assert all(done.code for done in both) and err.count("apportion: ") == 1, err
    assert "apportion: process 1: methods:estimate: got 'SystemExit: 0 (methods.py, line " in err
    left = tmp_path / "two" / "stopped" / "step-1"
    saved = tiny_runs.read_lines(left / "rollouts.jsonl")  # the whole batch, by the main process
    assert len(saved) == 6 and f"The rollouts are in {left}." in err


@pytest.mark.parametrize(
    ("environment", "named"),
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "DeepSpeed"),
        ({"ACCELERATE_USE_FSDP": "true"}, "fsdp_version"),
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, "mixed precision"),
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, "gradient accumulation"),
        ({"ACCELERATE_USE_CPU": "true", "MASTER_PORT": "29500"}, "accelerate launch"),
    ],
)
def test_launcher_settings_are_applied_or_refused(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], named: str
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=named):
        check_launch()


@pytest.mark.parametrize(
    ("changes", "named"),
    [({"sampling.batch_size": 2}, "sampling.batch_size"), ({"ppo.mini_batch": 2}, "ppo.mini_batch")],
)
def test_too_little_to_go_round_is_refused(
    world: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, int], named: str
) -> None:
    config = tiny_runs.config(world, **changes)
    check_shares(config)
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(ConfigError, match=named):
        check_shares(config)


def test_commands_that_cannot_share_are_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert main(["evaluate"]) == 2
    assert "apportion evaluate" in capsys.readouterr().err
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert main(["evaluate"]) == 2
    assert capsys.readouterr().err == ""


def test_in_one_process_every_collective_is_the_identity() -> None:
    x = torch.arange(6.0)
    assert collectives.world_size() == 1 and collectives.is_main() and collectives.broadcast_object("x") == "x"
    assert (
        collectives.all_reduce_tensor(x) is x
        and collectives.gather_rows(x) is x
        and torch.equal(collectives.shard(x), x)
    )
    assert collectives.shard_slice(5) == slice(0, 5)
    parameter = torch.nn.Parameter(x)
    parameter.grad = x.clone()
    collectives.sum_gradients([parameter])
    assert torch.equal(parameter.grad, x)
