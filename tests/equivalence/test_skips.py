"""Updates whose loss or gradient is not finite: nothing moves, bit for bit, they are counted, and too many end it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import tiny_runs
import torch
from torch import Tensor

from apportion import losses
from apportion.config import OptimConfig, PPOConfig, ScoreConfig
from apportion.errors import MonitorError, ScoreError
from apportion.evidence import Models
from apportion.evidence.scoring import score
from apportion.models.policy import Policy
from apportion.stages.rl.update import OldOutputs, Targets, update
from apportion.training.monitoring import drop_nonfinite
from apportion.training.nonfinite import SkippedUpdates
from apportion.training.optimizer import make_optimizer
from apportion.types import PolicyLoss, Rollouts
from apportion.user_code import check_rows

OPTIM = OptimConfig(lr=0.01)
ROWS = 6


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_runs.world(tmp_path_factory.mktemp("world"))


def scene(world: Path, **changes: Any) -> tuple[Policy, Rollouts, Targets]:
    """Return a policy, scored rollouts of its own with values, and random targets."""
    models = Models(tiny_runs.policy(world, **changes), tiny_runs.judge(world))
    batch = tiny_runs.sampled(models.policy, tiny_runs.prompts(ROWS), seed=2)
    batch = score(models, batch, {"values", "reference_logprobs"}, ScoreConfig())
    noise = torch.randn((2, *batch.mask.shape), generator=torch.Generator().manual_seed(4))
    segments = torch.where(batch.mask, batch.mask.cumsum(dim=1) - 1, -1)
    return models.policy, batch, Targets(noise[0], noise[1], batch.mask, batch.mask, segments)


def faulty(at: Iterable[int], fault: Callable[[Tensor], Tensor]) -> PolicyLoss:
    """Return PPO's loss with `fault` done to it in the micro-batches numbered `at`, from 0."""
    plain, bad, calls = losses.ppo(), set(at), iter(range(10**6))

    def terms(*given: Any) -> tuple[Tensor, dict[str, Tensor]]:
        total, sums = plain.terms(*given)
        return (fault(total) if next(calls) in bad else total), sums

    return plain._replace(terms=terms)


class InfiniteGradient(torch.autograd.Function):
    """A finite number whose gradient is infinite."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0] * torch.inf


FAULTS = {
    "loss nan": lambda total: total * torch.nan,
    "loss inf": lambda total: total + torch.inf,  # its gradient is finite
    "gradient inf": InfiniteGradient.apply,
}


def ppo(**changes: Any) -> PPOConfig:
    return PPOConfig(**{"epochs": 2, "mini_batch": 2, "micro_batch": 2, "whiten_advantages": True, **changes})


def everything(policy: Policy, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return copies of all that an optimizer step can change: weights, remainders of masters, moments, step counts."""
    found = {}
    for i, parameter in enumerate(policy.trainable()):
        found[f"{i}"] = parameter.detach().clone()
        found |= {f"{i} {name}": value.clone() for name, value in optimizer.state.get(parameter, {}).items()}
        if parameter in policy.remainders:
            found[f"{i} master"] = policy.remainders[parameter].clone()
    return found


def assert_equal(one: dict[str, Tensor], two: dict[str, Tensor]) -> None:
    assert one.keys() == two.keys()
    for name, value in one.items():
        assert torch.equal(value, two[name]), name


WEIGHTS = {
    "adapters": {},
    "float32": {"lora.rank": 0},
    "split masters": {"lora.rank": 0, "dtype": "bfloat16"},
    "16-bit moments": {"lora.rank": 0, "dtype": "bfloat16", "optim.moments": "bfloat16"},
    "own trunk": {"ppo.value_model": "separate"},
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("weights", WEIGHTS)
def test_a_skipped_update_moves_nothing_bit_for_bit(world: Path, weights: str, fault: str) -> None:
    """A batch whose second half is faulty ends where its first half does, and the next good step is the same."""
    policy, batch, targets = scene(world, **WEIGHTS[weights])
    if weights in ("split masters", "16-bit moments"):
        assert policy.remainders
    optim = OptimConfig(lr=0.01, moments="bfloat16" if weights == "16-bit moments" else "float32")
    optimizer = make_optimizer(policy.trainable(), policy.remainders, optim)
    skips, generator = SkippedUpdates(most=99), torch.Generator().manual_seed(1)
    update(policy, optimizer, losses.ppo(), batch, targets, ppo(epochs=1), optim, generator, skips=skips)
    assert skips.total == 0 and optimizer.state[policy.trainable()[0]]["step"] == 3
    moved = everything(policy, optimizer)
    wrong = faulty(range(6), FAULTS[fault])
    metrics = update(policy, optimizer, wrong, batch, targets, ppo(), optim, generator, skips=skips)
    assert_equal(moved, everything(policy, optimizer))
    assert metrics == {} and (skips.batch, skips.total, skips.in_a_row) == (6, 6, 6)
    assert sorted(skips.rows) == sorted(2 * list(range(ROWS)))
    assert all(p.grad is None for p in policy.trainable())
    update(policy, optimizer, losses.ppo(), batch, targets, ppo(epochs=1), optim, generator, skips=skips)
    assert skips.in_a_row == 0 and skips.total == 6
    after = everything(policy, optimizer)
    assert any(not torch.equal(moved[name], after[name]) for name in moved)


def test_metrics_are_means_over_the_updates_that_were_taken(world: Path) -> None:
    policy, batch, targets = scene(world)
    found = []
    for loss in (losses.ppo(), faulty([1], FAULTS["loss nan"])):
        optimizer = torch.optim.SGD(policy.trainable(), lr=0.0)  # moves nothing, so mini-batches can be compared
        generator, skips = torch.Generator().manual_seed(1), SkippedUpdates()
        found.append(
            update(policy, optimizer, loss, batch, targets, ppo(epochs=1), OPTIM, generator, skips=skips)
            | {"skipped": float(skips.batch)}
        )
    rows = torch.randperm(ROWS, generator=torch.Generator().manual_seed(1)).split(2)[1]
    only = Targets(*(t[rows] for t in targets))
    alone = update(policy, optimizer, losses.ppo(), batch.select(rows), only, ppo(epochs=1), OPTIM, torch.Generator())
    for name, value in alone.items():
        expected = (3 * found[0][name] - value) / 2
        assert found[1][name] == pytest.approx(expected, rel=1e-4, abs=1e-5), name
    assert found[0]["skipped"] == 0 and found[1]["skipped"] == 1


def test_statistics_of_a_skipped_batch_stay_out_of_the_weights(world: Path) -> None:
    policy, batch, targets = scene(world)
    optimizer = make_optimizer(policy.trainable(), policy.remainders, OPTIM)
    before, skips = everything(policy, optimizer), SkippedUpdates()
    first = OldOutputs(*torch.zeros((2, *batch.mask.shape)))
    once = ppo(epochs=1, mini_batch=ROWS, micro_batch=ROWS)
    wrong = faulty([0], FAULTS["loss nan"])
    update(policy, optimizer, wrong, batch, targets, once, OPTIM, torch.Generator(), first, skips)
    assert skips.batch == 1 and torch.isfinite(first.old_logprobs).all()
    assert_equal(before, everything(policy, optimizer))


@pytest.mark.parametrize("most", [1, 2, 3])
def test_so_many_in_a_row_and_no_more(world: Path, most: int) -> None:
    policy, batch, targets = scene(world)
    optimizer = make_optimizer(policy.trainable(), policy.remainders, OPTIM)
    skips, apart = (
        SkippedUpdates(most=most),
        [i for i in range(12) if i % most],
    )  # one fewer in a row than that, again and again
    settings = ppo(epochs=4)
    given = (batch, targets, settings, OPTIM, torch.Generator())
    update(policy, optimizer, faulty(apart, FAULTS["loss inf"]), *given, skips=skips)
    assert skips.total == len(apart) and skips.in_a_row < most
    skips, before = SkippedUpdates(most=most), everything(policy, optimizer)
    named = (
        rf"loss of {most} updates in a row \(monitors.max_skipped\): got inf; expected finite numbers. Likely causes"
    )
    with pytest.raises(MonitorError, match=named):
        update(policy, optimizer, faulty(range(99), FAULTS["loss inf"]), *given, skips=skips)
    assert skips.total == most
    assert_equal(before, everything(policy, optimizer))
    skips = SkippedUpdates(most=1)
    with pytest.raises(MonitorError, match="norm of the gradient of 1 updates"):
        update(policy, optimizer, faulty([0], FAULTS["gradient inf"]), *given, skips=skips)


def test_the_counts_are_in_the_state(world: Path) -> None:
    one, two = SkippedUpdates(most=3, in_a_row=2, total=5), SkippedUpdates(most=3)
    two.load_state(one.state)
    assert (two.in_a_row, two.total) == (2, 5)


def test_metrics_of_a_skipped_update_are_left_out_and_counted() -> None:
    metrics = {"sampling/logprob_gap": math.nan, "objective/entropy": math.inf, "objective/scores": 1.0}
    assert drop_nonfinite(metrics, 2) == {"objective/scores": 1.0, "monitors/dropped_metrics": 2.0}
    assert drop_nonfinite(metrics, 0) == metrics  # an error to log, not to hide


def test_rows_that_are_not_finite_are_named() -> None:
    mask = torch.tensor([[True, False], [True, True]])
    check_rows("rewards", torch.tensor([[1.0, torch.nan], [2.0, 3.0]]), mask)
    with pytest.raises(ScoreError, match="rewards of rollout 1, token 1: got inf; expected a finite number"):
        check_rows("rewards", torch.tensor([[1.0, torch.nan], [2.0, torch.inf]]), mask)
