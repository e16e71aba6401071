"""Runs of a few batches with every optimizer step recorded, to compare one process with several.

As a program, under torchrun: `parallel_worker.py WORLD OUT` writes OUT/rank-R.pt, one trace a case of `CASES`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tiny_runs
import torch

from apportion.cli.arguments import parse
from apportion.config import RewardConfig
from apportion.distributed import collectives
from apportion.errors import MonitorError
from apportion.masking import masked_mean, whiten
from apportion.stages.method import build_method
from apportion.stages.reward import train as reward
from apportion.stages.rl.learner import make_learner
from apportion.training.nonfinite import SkippedUpdates

ADAPTIVE = "[attention: {mix: 0.7}, kl_penalty: {coef: 0.1, target: 0.5, horizon: 20}]"
ENDING = {"sampling.stop": "eos", "sampling.max_new_tokens": 7}
CASES: dict[str, dict[str, Any]] = {
    # critic, both whitenings, a controller, responses of unlike lengths; 7 prompts, a tail of 3 rows
    "gae": ENDING | {"credit": ADAPTIVE, "ppo.whiten_rewards": True, "sampling.batch_size": 7},
    # 3 prompts of 2 samples: one process has one group, the other two
    "grpo": ENDING | {"algorithm": "grpo", "sampling.samples_per_prompt": 2, "ppo.epochs": 2},
    # columns of each prompt's row; a compared credit whose evidence fails in one process
    "columns": {
        "credit": "[{process: {function: 'reward_functions:of_its_row'}}]",
        "compare": "[sparse, reward_functions:needs_lost]",
    },
    "reinforce_pp": ENDING | {"advantages": "reinforce_pp", "credit": "[uniform, kl_penalty]", "lora.rank": 0},
    "bootstrap": ENDING
    | {"algorithm": "ppo", "ppo.truncated": "bootstrap", "ppo.value_model": "separate"}
    # a last mini-batch of one row, of which one process has nothing
    | {"ppo.micro_batch": 1, "sampling.batch_size": 5},
    # mini-batches of two rows, in some of which both were cut off and nothing is learned
    # functions and rules as rewards, one standardised over the batch of both processes, and texts to learn beside
    "rewards": {
        "algorithm": "grpo",
        "sampling.samples_per_prompt": 2,
        "ppo.epochs": 2,
        "reward_model": "null",
        "rewards": "[{trl_rewards:count_a: {normalise: batch}}, {regex: {pattern: '(?s).*e.*', weight: 2}}]",
        "compare": "[sparse]",
        "ppo.ptx_coef": 0.5,
        "ppo.ptx_data": "{world}/reviews.csv",
        "ppo.ptx_batch": 3,
    },
    "masked": {"sampling.stop": "eos", "sampling.max_new_tokens": 2, "ppo.truncated": "mask", "ppo.mini_batch": 2},
}


def trace(world: Path, output: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Return what a run of two batches did: the gradient of each optimizer step as it was taken, metrics, the
    controllers' state, the rollouts' ids, the final weights, and how many numbers the optimizer holds."""
    start = world / ("ending" if settings.get("sampling.stop") == "eos" else "policy")
    settings = {k: str(v).replace("{world}", str(world)) for k, v in settings.items()}
    config = tiny_runs.config(world, output, **{"policy": start, "log_rollouts": 8} | settings)
    learner = make_learner(config, build_method(config))
    learner.set_up_sharding(failed)
    policy = learner.models.policy
    parameters, whole = policy.learning(), set(policy.weights.replicated(policy.trainable()))
    gradients: list[torch.Tensor] = []
    step = learner.optimizer.step

    def flat(pick: Callable[[Any], torch.Tensor]) -> torch.Tensor:
        parts = [pick(p) if p in whole else collectives.gather_rows(pick(p)) for p in parameters]
        return torch.cat([part.flatten() for part in parts])

    def noted() -> None:
        # clipped already, by a norm that must be the same too
        gradients.append(flat(lambda p: torch.zeros_like(p) if p.grad is None else p.grad))
        step()

    learner.optimizer.step = noted  # type: ignore[method-assign]
    metrics, records = [], []
    for number in range(1, config.steps + 1):
        reported, written = tiny_runs.one_batch(learner, number)
        metrics.append(reported)
        records += written
    return {
        "gradients": gradients,
        "metrics": metrics,
        "ids": [record["response_ids"] for record in records],
        "state": learner.credit_state,
        "weights": flat(lambda p: p.detach()),
        "held": sum(t.numel() for state in learner.optimizer.state.values() for t in state.values()),
    }


def failed(error: str) -> None:
    """End this process with the error of another."""
    sys.stderr.write(error)
    os._exit(3)


def reductions() -> dict[str, torch.Tensor]:
    """Return masked reductions of this process's rows of a fixed batch, reduced over the processes."""
    generator = torch.Generator().manual_seed(5)
    x, mask = torch.randn(7, 4, generator=generator), torch.rand(7, 4, generator=generator) < 0.7
    mine = collectives.shard_slice(7)
    white = whiten(x[mine], mask[mine], reduce=collectives.all_reduce_tensor)
    mean = masked_mean(x[mine], mask[mine], collectives.all_reduce_tensor)
    ragged = collectives.gather_rows(x[mine, : 3 + collectives.rank()], fill=9, left=True)
    reported = collectives.gather_rows(mask[mine])
    return {"white": collectives.gather_rows(white), "mean": mean, "ragged": ragged, "mask": reported}


def skips() -> dict[str, Any]:
    """Return this process's results of four updates: a loss that is not finite in the last process alone, a
    gradient that is not, a good one, and a fault of both kinds that is one too many."""
    plain, bad, rows = torch.tensor(1.0), torch.tensor(torch.nan), torch.tensor([0, 1])
    mine = bad if collectives.rank() == collectives.world_size() - 1 else plain
    counted = SkippedUpdates(most=2)
    reported = [counted.allow(mine, plain, rows), counted.allow(plain, plain, rows), counted.allow(plain, bad, rows)]
    error = ""
    try:
        counted.allow(mine, bad, rows)
    except MonitorError as caught:
        error = str(caught)
    return {"told": reported, "total": counted.total, "error": error}


def rewarded(world: Path, output: Path) -> RewardConfig:
    """Return the settings of a reward model's training over ragged mini-batches."""
    given = {"model": world / "policy", "data": world / "reviews.csv", "excerpts": 30, "excerpt_tokens": "[4, 12]"}
    given |= {"batch_size": 5, "micro_batch": 2, "probe_excerpts": 20, "lora.rank": 4, "dtype": "float32"}
    flags = [str(word) for name, value in given.items() for word in (f"--{name}", value)]
    return parse(RewardConfig, "reward", [*flags, "--device", "cpu", "--output", str(output)]).config


def run() -> None:
    world, out = Path(sys.argv[1]), Path(sys.argv[2])
    torch.set_num_threads(1)
    collectives.start(torch.device("cpu"))
    found: dict[str, Any] = {case: trace(world, out / case, settings) for case, settings in CASES.items()}
    found |= {"skips": skips(), "reductions": reductions(), "main": collectives.broadcast_object(collectives.rank())}
    reward.train(rewarded(world, out / "reward"))
    torch.save(found, out / f"rank-{os.environ['RANK']}.pt")
    collectives.stop()


if __name__ == "__main__":
    run()
