"""`apportion evaluate` on tiny real runs: a policy that equals its start, and one with every figure recomputed."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_runs
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from apportion.cli.main import main
from apportion.intervals import distinct, mean_interval

COUNT = 10
TEMPERATURE = 0.8


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny_runs.world(tmp_path_factory.mktemp("world"))
    (folder / "fresh.jsonl").write_text(
        "".join(json.dumps({"prompt": f"{tiny.TEXTS[i % 4][: 10 + i]} {i}"}) + "\n" for i in range(14))
    )
    return folder


def run_of(world: Path, output: Path, **changes: Any) -> Path:
    common = {"policy": world / "ending", "sampling.stop": "eos", "sampling.temperature": TEMPERATURE}
    assert main(["rl", *tiny_runs.flags(world, output, **common | changes)]) == 0
    return output


def evaluated(world: Path, run: Path, *more: str) -> dict[str, Any]:
    flags = ["--run", str(run), "--prompts", str(world / "fresh.jsonl"), "--count", str(COUNT)]
    assert main(["evaluate", *flags, "--judge", "false", "--dtype", "float32", "--device", "cpu", *more]) == 0
    return json.loads((run / "evaluation.json").read_text())


@pytest.fixture(scope="module")
def trained(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run that moved far from its start, evaluated."""
    run = run_of(world, tmp_path_factory.mktemp("trained") / "run", steps=6, **{"optim.lr": 0.02, "loss.clip": 1.0})
    evaluated(world, run)
    return run


@pytest.mark.parametrize("rank", [4, 0])
def test_a_policy_that_equals_its_start_has_no_kl_and_the_same_figures(world: Path, tmp_path: Path, rank: int) -> None:
    run = run_of(world, tmp_path / "run", **{"optim.lr": 1e-12, "lora.rank": rank})
    start, final = tiny_runs.weights(world / "ending"), tiny_runs.weights(run / "final")
    assert max(float((start[k] - final[k]).abs().max()) for k in start) < 1e-9
    found = evaluated(world, run)
    assert abs(found["kl"]["mean"]) < 1e-6 and abs(found["kl"]["high"] - found["kl"]["low"]) < 1e-6
    for name in ("reward", "distinct2", "perplexity", "length"):
        assert found[f"{name}_before"] == pytest.approx(found[f"{name}_after"], abs=1e-6)
    samples = tiny_runs.read_lines(run / "samples.jsonl")
    assert len(samples) == COUNT and all(row["before"] == row["after"] for row in samples)


@torch.no_grad()
def log_likelihood(model: Any, prompt: list[int], ids: list[int]) -> float:
    """Return log p(ids | prompt), nats, at the run's temperature and without the pad, from a plain forward."""
    logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1] / TEMPERATURE
    logits[:, tiny_runs.PAD] = -torch.inf
    return float(logits.log_softmax(dim=-1)[torch.arange(len(ids)), ids].sum())


@torch.no_grad()
def written(model: Any, prompts: list[list[int]], world: Path) -> list[list[int]]:
    """Return what `evaluate` sampled, sampled again through the public sampler with its seed."""
    policy = tiny_runs.policy(world, stirred=False, **{"sampling.stop": "eos", "sampling.temperature": TEMPERATURE})
    policy.model, policy.value_head = model, None
    batch = tiny_runs.sampled(policy, prompts, seed=1, stop="eos", max_new_tokens=5)
    return [tiny_runs.alone(batch, row)[1] for row in range(len(batch))]


def test_every_figure_is_recomputed_from_the_models(world: Path, trained: Path) -> None:
    """KL to the start, perplexity under the start, distinct-2, length and reward, with plain forwards a row."""
    found = json.loads((trained / "evaluation.json").read_text())
    folders = {"before": world / "ending", "after": trained / "final"}
    models = {name: AutoModelForCausalLM.from_pretrained(f, dtype=torch.float32).eval() for name, f in folders.items()}
    judge = AutoModelForSequenceClassification.from_pretrained(world / "reward").eval()
    tokens = AutoTokenizer.from_pretrained(trained / "final")
    prompts = [row["ids"] for row in tiny_runs.read_lines(trained / "prompts.jsonl")]
    samples = tiny_runs.read_lines(trained / "samples.jsonl")
    for name, model in models.items():
        rows = written(model, prompts, world)
        assert [tokens.decode(ids, skip_special_tokens=True) for ids in rows] == [s[name] for s in samples]
        start = [log_likelihood(models["before"], p, ids) for p, ids in zip(prompts, rows, strict=True)]
        count = sum(map(len, rows))
        assert found[f"perplexity_{name}"] == pytest.approx(math.exp(-sum(start) / count), rel=1e-4)
        pairs = [(ids[i], ids[i + 1]) for ids in rows for i in range(len(ids) - 1)]
        assert found[f"distinct2_{name}"] == pytest.approx(len(set(pairs)) / len(pairs))
        assert found[f"length_{name}"] == pytest.approx(count / COUNT)
        with torch.no_grad():
            logits = [judge(torch.tensor([p + ids])).logits[0] for p, ids in zip(prompts, rows, strict=True)]
        rewards = [float(row[1] - row[0]) for row in logits]
        assert [s[f"reward_{name}"] for s in samples] == pytest.approx(rewards, abs=1e-4)
        assert found[f"reward_{name}"] == pytest.approx(mean_interval(rewards), abs=1e-4)
        if name == "after":
            mine = [log_likelihood(model, p, ids) for p, ids in zip(prompts, rows, strict=True)]
            kl = [a - b for a, b in zip(mine, start, strict=True)]
            assert [s["kl"] for s in samples] == pytest.approx(kl, abs=1e-4)
            assert found["kl"] == pytest.approx(mean_interval(kl), abs=1e-4)
            assert found["kl"]["mean"] > 0.3, "the policy did not move: nothing was told apart"


def test_prompts_are_the_first_ones_and_cut_as_in_the_run(world: Path, trained: Path) -> None:
    rows = tiny_runs.read_lines(trained / "prompts.jsonl")
    tokens = AutoTokenizer.from_pretrained(trained / "final")
    texts = [row["prompt"] for row in tiny_runs.read_lines(world / "fresh.jsonl")]
    assert len(rows) == COUNT
    for row, text in zip(rows, texts, strict=False):
        assert 4 <= len(row["ids"]) <= 8 and text.startswith(row["prompt"])
        assert row["ids"] == tokens(text)["input_ids"][: len(row["ids"])]


def test_evaluating_again_replaces_what_was_there(world: Path, trained: Path) -> None:
    before = (trained / "evaluation.json").read_text()
    assert json.loads(before) == evaluated(world, trained)
    assert len(tiny_runs.read_lines(trained / "samples.jsonl")) == COUNT
    assert evaluated(world, trained, "--seed", "5") != json.loads(before)
    assert evaluated(world, trained) == json.loads(before)


def test_all_prompts_are_used_when_there_are_fewer_than_requested(world: Path, tmp_path: Path) -> None:
    run = run_of(world, tmp_path / "run")
    found = evaluated(world, run, "--count", "40")
    assert found["prompts"] == 14 == len(tiny_runs.read_lines(run / "samples.jsonl"))


def test_the_base_of_a_16_bit_run_is_its_own_start(world: Path, tmp_path: Path) -> None:
    """Loaded in 16 bit, final/ of a run that did not move is the start, so that its KL is 0 and not rounding."""
    run = run_of(world, tmp_path / "run", dtype="bfloat16", **{"optim.lr": 1e-12})
    found = evaluated(world, run, "--dtype", "bfloat16")
    assert abs(found["kl"]["mean"]) < 1e-6


def test_the_summary_holds_the_measured_figures(world: Path, trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = evaluated(world, trained)
    out = capsys.readouterr().out
    assert f"{found['distinct2_before']:.3f} -> {found['distinct2_after']:.3f}" in out
    assert f"{found['perplexity_before']:.1f} -> {found['perplexity_after']:.1f}" in out and "95%" in out


def test_distinct_counts_bigrams_within_rows_only() -> None:
    assert distinct([[1, 2, 1, 2], [2, 1]]) == pytest.approx(2 / 4)
    assert distinct([[1], [2]]) == 0.0 and distinct([[1, 2], [3, 4]]) == 1.0
    assert distinct([[1, 2, 3, 1, 2, 3]], n=3) == pytest.approx(3 / 4)


def test_prompts_are_those_of_the_split_that_is_named(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In rl, diagnose and evaluate alike; without a name it is train. The error of an absent one lists those there."""
    folder = tmp_path / "prompts"
    folder.mkdir()
    texts = {name: [f"{name} film {i}" for i in range(8)] for name in ("train", "test")}
    for name, rows in texts.items():
        file = folder / f"{name}-00000-of-00001.jsonl"
        file.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in rows))
    words: dict[str, Any] = {"prompts": folder, "sampling.prompt_tokens": "null", "compare": "[]", "log_rollouts": 4}
    for split, expected in ((None, "train"), ("test", "test")):
        named = {} if split is None else {"split": split}
        run = run_of(world, tmp_path / expected, steps=1, **words | named)
        assert {row["prompt"] for row in tiny_runs.read_lines(run / "rollouts.jsonl")} <= set(texts[expected])
    flags = ["--prompts", str(folder), "--judge", "false", "--device", "cpu", "--dtype", "float32", "--count", "3"]
    assert main(["evaluate", "--run", str(run), *flags, "--split", "eval"]) == 0  # another word for test
    assert [row["prompt"] for row in tiny_runs.read_lines(run / "prompts.jsonl")] == texts["test"][:3]
    models = ["--policy", str(world / "ending"), "--reward_model", str(world / "reward"), "--device", "cpu"]
    where = ["--prompts", str(folder), "--split", "dev"]
    for command in (
        ["evaluate", "--run", str(run), *flags, "--split", "dev"],
        ["rl", *models, *where, "--output", str(tmp_path / "none")],
        ["diagnose", *models, *where, "--output", str(tmp_path / "none")],
    ):
        capsys.readouterr()
        assert main(command) == 2
        message = capsys.readouterr().err
        assert f"got '{folder} with the splits test, train'; expected a split 'dev'. Name one of its splits" in message
    assert main(["rl", *models, "--split", "test", "--output", str(tmp_path / "none")]) == 2
    assert "got \"imdb with split 'test'\"; expected data with splits. Leave the split out." in capsys.readouterr().err
