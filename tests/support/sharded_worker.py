"""Runs of two processes with sharded weights, for the tests to compare.

As a program, under torchrun: `sharded_worker.py WORLD OUT` writes OUT/rank-R.pt with a trace a case of `CASES`, what
went wrong with a loss that fails in one process, and runs: OUT/halves, finished; OUT/stopped, to be resumed; OUT/begun,
which one process began.
"""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import parallel_worker
import tiny_runs
import torch
from torch import Tensor

from apportion.cli.arguments import parse
from apportion.config import RewardConfig, RLConfig
from apportion.distributed import collectives
from apportion.errors import ApportionError
from apportion.losses import ppo
from apportion.stages.method import build_method
from apportion.stages.reward import train as reward
from apportion.stages.rl import train as rl
from apportion.stages.rl.learner import make_learner

CASES: dict[str, dict[str, Any]] = {
    # 7 rollouts in mini-batches of 5 and 2: shares of 3 and 2, which are 2 micro-batches and 1. The prompts of one
    # process share enough to be read once, those of the other do not. Adapters of one row: a process has none of it
    "lora": parallel_worker.CASES["gae"] | {"ppo.mini_batch": 5, "ppo.micro_batch": 2, "lora.rank": 1},
    # 6 rollouts in mini-batches of 5 and 1: one process has nothing of the second
    "all": parallel_worker.CASES["bootstrap"] | {"lora.rank": 0, "sampling.batch_size": 6, "ppo.mini_batch": 5},
    # layers kept from the forward for the backward pass
    "groups": parallel_worker.CASES["grpo"] | {"ppo.mini_batch": 6, "ppo.micro_batch": 2},
}
# float32 adapters over 16-bit weights, gathered together; float32 masters of 16-bit weights
SIXTEEN = {"mixed": {"dtype": "bfloat16"}, "masters": {"dtype": "bfloat16", "lora.rank": 0}}


def settings(world: Path, output: Path, **changes: Any) -> RLConfig:
    """Return the settings of a run of all weights with a checkpoint after each of its three batches."""
    every = {"lora.rank": 0, "ppo.value_model": "separate", "checkpoint_every": 1, "keep_checkpoints": 5, "steps": 3}
    return tiny_runs.config(world, output, **every | changes)


def rewarded(world: Path, output: Path, **changes: Any) -> RewardConfig:
    """Return the settings of a reward model's training; the last of its batches has fewer excerpts than processes."""
    given = {"model": world / "policy", "data": world / "reviews.csv", "excerpts": 16, "excerpt_tokens": "[4, 12]"}
    given |= {
        "batch_size": 5,
        "micro_batch": 2,
        "probe_excerpts": 8,
        "lora.rank": 4,
        "dtype": "float32",
        "device": "cpu",
    }
    flags = [str(word) for name, value in (given | changes).items() for word in (f"--{name}", value)]
    return parse(RewardConfig, "reward", [*flags, "--output", str(output)]).config


def stop_after(last: int) -> Any:
    """Return what ends a run after batch `last` as a second Ctrl-C does."""

    def on_step(step: int, steps: int, metrics: dict[str, float]) -> None:
        if step == last:
            raise KeyboardInterrupt

    return on_step


def failing_loss(world: Path, output: Path) -> str:
    """Return this process's error where a loss fails in process 1 alone, in its first micro-batch."""
    config = tiny_runs.config(world, output)
    learner = make_learner(config, build_method(config))
    learner.set_up_sharding(parallel_worker.failed)
    plain = ppo()

    def terms(*given: Any) -> tuple[Tensor, dict[str, Tensor]]:
        if collectives.rank() == 1:
            raise ValueError("the loss is lost")
        return plain.terms(*given)

    learner.method = learner.method._replace(loss=plain._replace(terms=terms))
    try:
        tiny_runs.one_batch(learner)
    except ApportionError as error:
        return str(error)
    return ""


def run() -> None:
    world, out = Path(sys.argv[1]), Path(sys.argv[2])
    torch.set_num_threads(1)
    collectives.start(torch.device("cpu"))
    found: dict[str, Any] = {}
    for name, case in (CASES | SIXTEEN).items():
        os.environ["FSDP_RESHARD_AFTER_FORWARD"] = str(name != "groups").lower()
        found[name] = parallel_worker.trace(world, out / name, case)
    found["error"] = failing_loss(world, out / "failing")
    rl.train(settings(world, out / "halves", steps=2, dtype="bfloat16"))
    with suppress(KeyboardInterrupt):
        rl.train(settings(world, out / "stopped"), on_step=stop_after(1))
    rl.train(settings(world, out / "begun"))
    reward.train(rewarded(world, out / "reward"))
    reward.train(rewarded(world, out / "reward-masters", **{"lora.rank": 0, "dtype": "bfloat16"}))
    torch.save(found, out / f"rank-{os.environ['RANK']}.pt")
    collectives.stop()


if __name__ == "__main__":
    run()
