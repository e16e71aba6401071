"""The update that begins with the forward of scoring, against the same run that computes that forward again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import tiny
import tiny_runs
import torch
from torch import Tensor

from apportion.stages.method import build_method
from apportion.stages.rl import learner as module
from apportion.stages.rl.learner import make_learner

STEPS, ROWS = 3, 6
ADAM = {
    "optim.eps": 1e-2
}  # rounding stays small: with a tiny epsilon Adam turns it into steps of a whole learning rate
GROUPS = {"sampling.samples_per_prompt": 3, "ppo.epochs": 2}

SETTINGS: dict[str, dict[str, Any]] = {
    "all weights": {"lora.rank": 0},
    "all weights, a value model": {"lora.rank": 0, "ppo.value_model": "separate"},
    "adapters everywhere": {"lora.targets": "all", "ppo.epochs": 4},
    "values from the reward model": {"ppo.value_model": "reward"},
    "the default method": {"algorithm": "red", "lora.targets": "all", "ppo.epochs": "null"},
    "values of whole actions": {"algorithm": "ma-ppo-paper", "lora.rank": 0},
    "ends and a mask": {"policy": "ending", "sampling.stop": "eos", "ppo.truncated": "mask"},
    "ends and a bootstrap": {
        "policy": "ending",
        "sampling.stop": "eos",
        "algorithm": "ppo",
        "ppo.truncated": "bootstrap",
    },
    "groups": {"algorithm": "grpo", **GROUPS},
    "groups, all weights": {"algorithm": "abc-grpo", "lora.rank": 0, **GROUPS},
    "fresh rollouts": {"algorithm": "vineppo", "ppo.epochs": 2},
    "attention of the policy": {"algorithm": "abc-d", "compare": "[sparse, policy_attention]"},
    "gradients of the reward model": {"credit": "attribution"},
    "segments by entropy": {"segments": "entropy", "lora.rank": 0},
    "a mix": {"ppo.ptx_coef": 0.5, "ppo.ptx_data": "mix", "ppo.ptx_batch": 2},
    "two reward models": {"rewards": "two", "algorithm": "red"},
    "functions": {"rewards": "functions", "algorithm": "ppo", "lora.rank": 0},
    "rewards a token": {"rewards": "dense", "algorithm": "ppo"},
    "whitened rewards, a temperature": {"ppo.whiten_rewards": "true", "sampling.temperature": 0.7},
    "layers of transformers": {"fast_kernels": "false", "lora.rank": 0},
}
SIXTEEN_BIT = {"all weights": {"lora.rank": 0}, "adapters": {"lora.targets": "all"}}
FIGURES = ("loss/policy", "loss/value", "loss/ptx", "policy/grad_norm", "objective/kl", "objective/scores")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny_runs.world(tmp_path_factory.mktemp("world"))
    tiny.save_reward(folder / "second", seed=5)
    texts = [{"text": "A great story, well told."}, {"text": "Boring from beginning to end."}]
    (folder / "mix.jsonl").write_text("".join(json.dumps(one) + "\n" for one in texts))
    return folder


def placed(world: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings with the paths that their short words stand for, of runs whose mini-batch is the batch."""
    paths = {"ending": world / "ending", "mix": world / "mix.jsonl"}
    second = {"weight": -0.5, "normalise": "batch"}
    rewards: dict[str, list[Any]] = {
        "two": [{str(world / "reward"): {"name": "one"}}, {str(world / "second"): second}],
        "functions": ["trl_rewards:count_a", {"regex": {"pattern": "(?s).*e.*"}}],
        "dense": ["trl_rewards:per_token", {"trl_rewards:count_a": {"weight": 0.5}}],
    }
    chosen = {key: paths.get(value, value) for key, value in settings.items()}
    if "rewards" in chosen:
        chosen |= {"rewards": json.dumps(rewards[chosen["rewards"]]), "reward_model": "null"}
    return {"ppo.mini_batch": ROWS, "ppo.micro_batch": ROWS, "ppo.epochs": 2, **ADAM} | chosen


class Trained(NamedTuple):
    """What some steps gave: metrics of each, the weights, and how many forwards were computed in all."""

    metrics: list[dict[str, float]]
    weights: list[Tensor]
    forwards: int


def trained(world: Path, changes: dict[str, Any], steps: int = STEPS) -> Trained:
    config = tiny_runs.config(world, world / "run", **{"steps": steps, "log_rollouts": 0} | changes)
    learner = make_learner(config, build_method(config))
    seen: list[int] = []
    hook = learner.policy.model.register_forward_hook(lambda *_: seen.append(1))
    metrics = [tiny_runs.one_batch(learner, step)[0] for step in range(1, steps + 1)]
    hook.remove()
    assert learner.policy.kept is None, "no graph is held from one batch to the next"
    return Trained(metrics, [one.detach().clone() for one in learner.policy.trainable()], len(seen))


def check_equal(one: Trained, other: Trained, *, rel: float = 1e-4, atol: float = 5e-6) -> None:
    for mine, theirs in zip(one.metrics, other.metrics, strict=True):
        figures = {name: theirs[name] for name in FIGURES if name in theirs}
        assert {name: mine[name] for name in figures} == pytest.approx(figures, rel=rel, abs=1e-5)
    for weight, expected in zip(one.weights, other.weights, strict=True):
        torch.testing.assert_close(weight, expected, rtol=0, atol=atol)


@pytest.mark.parametrize("name", list(SETTINGS))
def test_the_update_that_begins_with_the_forward_of_scoring(
    world: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    settings = placed(world, SETTINGS[name])
    kept = trained(world, settings)
    monkeypatch.setattr(module, "starts_update", lambda *_: False)
    again = trained(world, settings)
    assert kept.forwards < again.forwards
    assert kept.metrics[0]["policy/grad_norm"] > 0
    check_equal(kept, again)


@pytest.mark.parametrize("name", ["adapters everywhere", "ends and a mask", "a mix", "two reward models"])
def test_micro_batches_that_do_not_divide_the_batch(world: Path, name: str) -> None:
    settings = placed(world, SETTINGS[name])
    whole = trained(world, settings)
    check_equal(whole, trained(world, settings | {"ppo.micro_batch": 4, "scores.micro_batch": 4}))


@pytest.mark.parametrize("name", list(SIXTEEN_BIT))
def test_in_sixteen_bit(world: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """One step, before its rounding changes what is sampled."""
    settings = placed(world, SIXTEEN_BIT[name]) | {"dtype": "bfloat16", "reward_dtype": "bfloat16"}
    kept = trained(world, settings, 1)
    monkeypatch.setattr(module, "starts_update", lambda *_: False)
    again = trained(world, settings, 1)
    assert kept.forwards < again.forwards
    check_equal(kept, again, rel=1e-3, atol=8e-3)  # a weight near 1 has steps of 8e-3
