"""Two processes that each keep a part of every weight: the same run as in one, half of the optimizer's memory."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import parallel_worker
import pytest
import sharded_worker
import tiny_runs
import torch
from commands import Server
from safetensors.torch import load_file
from two_processes import ACCELERATE, MACHINE, REPO, differences, launch, run_pair

from apportion.distributed.launch import check_launch
from apportion.distributed.sharding import check_groups, layers_of
from apportion.errors import ConfigError, ModelError
from apportion.stages.method import build_method
from apportion.stages.reward import train as reward
from apportion.stages.rl import train as rl
from apportion.stages.rl.learner import make_learner
from apportion.training.checkpoint import load_latest
from apportion.training.optimizer import zero_with_grad
from apportion.training.run_folder import RunFolder

RECIPE = REPO / "recipes" / "accelerate" / "fsdp2_cpu.yaml"
FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
LOSS = '''
"""A loss whose backward pass fails in one process, where the other one waits for it."""
import os
import torch
from apportion.losses import ppo


class Broken(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        if os.environ["RANK"] == os.environ["FAILS"]:
            raise RuntimeError("the gradient is lost")
        return gradient


def broken():
    plain = ppo()
    return plain._replace(terms=lambda *given: (lambda total, sums: (Broken.apply(total), sums))(*plain.terms(*given)))
'''


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_runs.world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def out(world: Path, heavy: Server, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of what two processes did: `sharded_worker.run`."""
    out = tmp_path_factory.mktemp("two")
    with pytest.raises(KeyboardInterrupt):
        rl.train(sharded_worker.settings(world, out / "begun"), on_step=sharded_worker.stop_after(1))
    run_pair(heavy, "sharded_worker.py", world, out, folder=out, **FSDP2)
    return out


@pytest.fixture(scope="module")
def ranks(out: Path) -> list[dict[str, Any]]:
    return [torch.load(out / f"rank-{i}.pt", weights_only=True) for i in (0, 1)]


@pytest.fixture(scope="module")
def plain(world: Path, out: Path) -> Path:
    """The run of one process, from its first batch to its last."""
    return rl.train(sharded_worker.settings(world, out / "plain")).path


@pytest.mark.parametrize("case", sharded_worker.CASES)
def test_sharded_steps_equal_unsharded_ones(
    world: Path, ranks: list[dict[str, Any]], case: str, tmp_path: Path
) -> None:
    one = parallel_worker.trace(world, tmp_path, sharded_worker.CASES[case])
    two, other = ranks[0][case], ranks[1][case]
    assert differences(one, two, other) == []
    # the value head (33 weights, two moments and a step each) is whole in both; so is a step of every other weight
    assert two["held"] + other["held"] < 1.05 * one["held"] + 200
    assert max(two["held"], other["held"]) < 0.6 * one["held"] or case == "lora"


@pytest.mark.parametrize("case", sharded_worker.SIXTEEN)
def test_sharded_sixteen_bit_weights_train_alike(
    world: Path, ranks: list[dict[str, Any]], case: str, tmp_path: Path
) -> None:
    one = parallel_worker.trace(world, tmp_path, sharded_worker.SIXTEEN[case])
    two, other = ranks[0][case], ranks[1][case]
    wide, parts = (run["gradients"][0].float() for run in (one, two))
    assert float((wide - parts).norm() / wide.norm()) < 0.01  # 16-bit numbers are rounded to 0.004 of their size
    assert torch.equal(two["weights"], other["weights"]) and two["ids"][:6] == one["ids"][:6]


def test_optimizer_state_is_halved(world: Path, out: Path) -> None:
    config = sharded_worker.settings(world, out / "unused")
    learner = make_learner(config, build_method(config))
    held = torch.load(out / "rank-0.pt", weights_only=True)["all"]["held"]
    weights = sum(p.numel() for p in learner.models.policy.trainable())
    assert 2 * weights / 2 < held < 2 * weights / 2 * 1.02  # two moments of half of the weights


def test_a_loss_that_fails_in_one_process_is_an_error_in_both(ranks: list[dict[str, Any]]) -> None:
    assert "process 1 failed" in ranks[0]["error"] and "ValueError: the loss is lost" in ranks[0]["error"]
    assert ranks[1]["error"] == "process 1 failed: the loss is lost"


def test_a_sharded_checkpoint_is_that_of_one_process(world: Path, out: Path) -> None:
    config = sharded_worker.settings(world, out / "halves", steps=2, dtype="bfloat16")
    learner = make_learner(config, build_method(config))
    assert load_latest(RunFolder(out / "halves", "rl"), learner) == 1
    policy, moved = learner.models.policy, learner.state_dict()
    for file in ("weights", "optimizer"):
        stored = load_file(out / "halves" / "checkpoints" / "step-1" / f"{file}.safetensors")
        assert stored.keys() == moved[file].keys()
        assert all(torch.equal(stored[name], moved[file][name]) for name in stored)
    names = {name.partition(".")[2] for name in moved["optimizer"]}
    assert names == {"step", "exp_avg", "exp_avg_sq", "remainder"}
    assert all(state["exp_avg"].shape == p.shape for p, state in learner.optimizer.state.items())
    assert len(policy.remainders) == len(policy.trainable()) - 2  # all but the value head's two


def test_the_final_model_holds_the_masters(out: Path) -> None:
    weights = tiny_runs.weights(out / "halves" / "final")
    message = json.loads((out / "halves" / "final" / "config.json").read_text())
    assert message["architectures"] == ["LlamaForCausalLM"]
    wide = torch.cat([w.flatten() for w in weights.values()])
    assert wide.dtype == torch.float32 and (wide != wide.bfloat16().float()).float().mean() > 0.5


@pytest.mark.parametrize("name", ["stopped", "begun"])
def test_a_run_resumes_sharded_and_unsharded(world: Path, out: Path, plain: Path, name: str) -> None:
    """`stopped` was started sharded and is resumed in one process, `begun` the other way."""
    if name == "stopped":
        rl.train(sharded_worker.settings(world, out / name))
    one, two = (tiny_runs.read_lines(path / "metrics.jsonl") for path in (plain, out / name))
    assert [row["step"] for row in two] == [1, 2, 3]
    for mine, theirs in zip(one, two, strict=True):
        for key in (k for k in mine if not k.startswith(MACHINE)):
            assert theirs[key] == pytest.approx(mine[key], rel=1e-3, abs=1e-5), key
    weights, reference = (tiny_runs.weights(path / "final") for path in (out / name, plain))
    assert weights.keys() == reference.keys()
    assert all(torch.allclose(weights[key], reference[key], atol=1e-4) for key in reference)


@pytest.mark.parametrize(("name", "close"), [("reward", 1e-5), ("reward-masters", 0.05)])
def test_a_sharded_reward_model_is_that_of_one_process(world: Path, out: Path, name: str, close: float) -> None:
    changes = {"lora.rank": 0, "dtype": "bfloat16"} if "masters" in name else {}
    alone = reward.train(sharded_worker.rewarded(world, out / f"{name}-alone", **changes)).path
    one, two = (tiny_runs.read_lines(path / "metrics.jsonl") for path in (alone, out / name))
    assert len(one) == len(two) == 4
    for mine, theirs in zip(one, two, strict=True):
        assert theirs["loss/reward"] == pytest.approx(mine["loss/reward"], rel=max(1e-4, close))
    weights, reference = (tiny_runs.weights(path / "final") for path in (out / name, alone))
    assert weights.keys() == reference.keys()
    assert all(torch.allclose(weights[key], reference[key], atol=close) for key in reference)


@pytest.mark.long
def test_accelerate_launch_shares_weights(world: Path, tmp_path: Path) -> None:
    settings = {"policy": world / "ending", "sampling.stop": "eos", "checkpoint_every": 1}
    flags = tiny_runs.flags(world, tmp_path / "two", **settings)
    done = launch([*ACCELERATE, "--config_file", RECIPE, "-m", "apportion", "rl", *flags])
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(tmp_path / "two")]
    one = rl.train(tiny_runs.config(world, tmp_path / "one", **settings)).path
    weights, reference = (tiny_runs.weights(path / "final") for path in (tmp_path / "two", one))
    assert all(torch.allclose(weights[name], reference[name], atol=1e-5) for name in reference)


@pytest.mark.parametrize("process", [1, pytest.param(0, marks=pytest.mark.long)])
def test_an_error_while_others_wait_ends_all_with_one_message(world: Path, tmp_path: Path, process: int) -> None:
    (tmp_path / "broken_loss.py").write_text(LOSS)
    flags = tiny_runs.flags(world, tmp_path / "two", loss="broken_loss:broken")
    paths = os.pathsep.join([str(REPO / "src"), str(tmp_path)])
    words = [*ACCELERATE, "--config_file", RECIPE, "-m", "apportion", "rl", *flags]
    done = launch(words, PYTHONPATH=paths, FAILS=str(process))
    assert done.returncode != 0
    assert done.stderr.count("RuntimeError: the gradient is lost") == 1, done.stderr
    if process == 1:  # else it is the main process's own, with its traceback
        # the launcher may end the waiting process by SIGTERM, which that process reports as such
        messages = [line for line in done.stderr.splitlines() if "apportion: " in line and "SIGTERM" not in line]
        assert messages == ["apportion: process 1 failed."], done.stderr
    status = json.loads((tmp_path / "two" / "status.json").read_text())
    assert status["status"] == "failed" and "the gradient is lost" in status["error"]


@pytest.mark.parametrize(
    ("environment", "named"),
    [
        ({"FSDP_VERSION": "1"}, "fsdp_version: got '1'.*'2'"),
        ({"FSDP_OFFLOAD_PARAMS": "true"}, "fsdp_offload_params"),
        ({"FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}, "fsdp_cpu_ram_efficient_loading"),
        ({"FSDP_TRANSFORMER_CLS_TO_WRAP": "LlamaDecoderLayer"}, "fsdp_transformer_layer_cls_to_wrap"),
        ({"FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT"}, "fsdp_state_dict_type"),
        ({"ACCELERATE_USE_FSDP": "false", "ACCELERATE_USE_DEEPSPEED": "true"}, "DeepSpeed.*fsdp2_gpu.yaml"),
    ],
)
def test_options_that_would_be_ignored_are_refused(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], named: str
) -> None:
    for name, value in FSDP2.items():
        monkeypatch.setenv(name, value)
    check_launch()
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=named):
        check_launch()


def test_version_2_must_be_requested(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ConfigError, match="fsdp_version"):
        check_launch()


def test_lists_inside_a_layer_are_the_layers_own() -> None:
    inner = torch.nn.ModuleList([torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)])
    outer = torch.nn.ModuleList([torch.nn.Sequential(torch.nn.ModuleDict({"experts": inner})), torch.nn.Linear(2, 2)])
    assert layers_of(torch.nn.Sequential(outer)) == list(outer)


def test_layers_that_share_weights_are_refused() -> None:
    shared = torch.nn.Linear(2, 2)
    twice = torch.nn.Sequential(torch.nn.ModuleList([shared, torch.nn.Sequential(shared)]))
    with pytest.raises(ModelError, match="several layers share"):
        check_groups(twice)
    outside = torch.nn.Sequential(torch.nn.ModuleList([shared]), torch.nn.Sequential(shared))
    check_groups(torch.nn.Sequential(torch.nn.ModuleList([shared]), torch.nn.Linear(2, 2)))
    inner = torch.nn.Linear(2, 2)
    inner.weight = shared.weight
    with pytest.raises(ModelError, match="several layers share"):
        check_groups(torch.nn.Sequential(outside, inner))
    with pytest.raises(ModelError, match="bfloat16 and float32"):
        check_groups(torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2).bfloat16()))


def test_a_micro_batch_that_does_not_count_has_a_gradient_of_0() -> None:
    x = torch.tensor([1.0, math.nan, math.inf], requires_grad=True)
    total = zero_with_grad(x)
    total.backward()
    assert total == 0 and torch.equal(x.grad, torch.zeros(3))
