"""The benchmark of PPO-ptx: its likelihood by brute force, its comparison by hand, and the command on tiny models."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import tiny
import torch
from benchmarks.ppo_ptx.__main__ import last_batches, main
from benchmarks.ppo_ptx.figures import compared, table
from benchmarks.ppo_ptx.likelihood import held_out_rows, nll
from transformers import AutoModelForCausalLM

from apportion.stages.rl.mix import Encoded


def write_texts(path: Path) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in tiny.TEXTS))
    return path


def test_likelihood_is_that_of_each_text_alone(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny.save_policy(tmp_path / "policy"), dtype=torch.float32).eval()
    rows = [
        Encoded([5], [6, 7, 8, 9], [True] * 4),
        Encoded([10, 11, 12], [13, 14], [True, False]),  # the last id is read, but not counted
        Encoded([20, 21], [22, 23, 24], [False, True, True]),
    ]
    losses = []
    for row in rows:
        ids = [*row.prompt, *row.completion]
        logprobs = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(dim=-1)
        for place, counted in enumerate(row.trained, len(row.prompt)):
            losses += [-logprobs[place - 1, ids[place]].item()] if counted else []
    assert len(losses) == 7
    for batch in (1, 2, 4):
        assert nll(model, rows, batch) == pytest.approx(sum(losses) / 7, abs=1e-5)


def test_held_out_texts_end_and_are_cut(tmp_path: Path) -> None:
    folder, texts = tiny.save_policy(tmp_path / "policy"), write_texts(tmp_path / "texts.jsonl")
    tokenizer = tiny.tokenizer()
    rows = held_out_rows(str(folder), texts, 100)
    assert [[*row.prompt, *row.completion] for row in rows] == [[*tokenizer(t)["input_ids"], 1] for t in tiny.TEXTS]
    assert all(all(row.trained) and len(row.prompt) == 1 for row in rows)
    assert {len(row.prompt) + len(row.completion) for row in held_out_rows(str(folder), texts, 6)} == {6}


def part(nll: float, reward: float, kl: float = 1.0) -> dict[str, float]:
    return {"nll": nll, "reward": reward, "kl": kl}


def test_the_comparison_by_hand() -> None:
    parts = {"ppo 0": part(3.0, 1.0), "ptx 0": part(2.8, 1.1), "ppo 1": part(3.2, 1.2), "ptx 1": part(2.9, 1.1)}
    parts |= {"ppo 2": part(3.1, 0.9), "ptx 2": part(3.0, 0.9, 2.5), "ptx 3": part(9.0, 9.0)}  # 3 has no pair
    found = compared(parts, start=2.9)
    assert found["seeds"] == [0, 1, 2]
    # differences −0.2, −0.3, −0.1: mean −0.2, sd 0.1, t(2) = 4.303
    half = 4.303 * 0.1 / math.sqrt(3)
    assert found["nll"]["mean"] == pytest.approx(-0.2) and found["nll"]["high"] == pytest.approx(-0.2 + half)
    assert found["nll"]["high"] > 0 and not found["passed"]
    # 0.1, −0.1, 0
    assert found["reward"]["mean"] == pytest.approx(0) and found["reward"]["low"] == pytest.approx(-half)
    assert found["kl"]["mean"] == pytest.approx(0.5)
    assert "PPO-ptx − PPO, nll: -0.200 [-0.448, +0.048]" in table(parts, found)


@pytest.mark.parametrize(
    ("gaps", "gains", "passed"),
    [
        ([-0.2, -0.21, -0.19], [0.1, -0.1, 0.0], True),
        ([0.2, 0.21, 0.19], [0.1, -0.1, 0.0], False),  # a higher NLL
        ([-0.2, -0.21, -0.19], [-0.5, -0.51, -0.49], False),  # bought with reward
        ([-0.2, -0.21, -0.19], [0.5, 0.51, 0.49], False),  # another reward: not the comparison asked for
        ([-0.2], [0.0], False),  # one seed has no interval
    ],
)
def test_it_passes_only_with_a_lower_nll_at_equal_reward(gaps: list[float], gains: list[float], passed: bool) -> None:
    parts = {f"ppo {seed}": part(3.0, 1.0) for seed in range(len(gaps))}
    parts |= {f"ptx {i}": part(3.0 + gap, 1.0 + gain) for i, (gap, gain) in enumerate(zip(gaps, gains, strict=True))}
    assert compared(parts, start=3.0)["passed"] is passed


def test_the_last_batches_are_averaged(tmp_path: Path) -> None:
    rows = [{"objective/scores": float(i), "objective/kl": 2.0 * i} for i in range(4)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert last_batches(tmp_path, 2) == {"reward": 2.5, "kl": 5.0}


def test_a_mix_of_ones_own_needs_held_out_texts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reward = tiny.save_reward(tmp_path / "reward")
    words = ["--reward_model", reward, "--mix", "mine.jsonl", "--output", tmp_path / "out.json", "--threads", 1]
    assert main([str(word) for word in words]) == 2
    assert "--held_out" in capsys.readouterr().err and not (tmp_path / "out.json").exists()


@pytest.mark.long  # four processes
def test_the_command_adds_seeds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = {"policy": tiny.save_policy(tmp_path / "policy"), "reward_model": tiny.save_reward(tmp_path / "reward")}
    files = {"prompts": tiny.save_prompts(tmp_path / "prompts.jsonl"), "mix": write_texts(tmp_path / "mix.jsonl")}
    given = folders | files | {"held_out": files["mix"], "output": tmp_path / "out.json", "folder": tmp_path / "runs"}
    more = {"coef": 5, "steps": 2, "last": 1, "threads": 1, "seeds": 1, "mix_tokens": 24}
    words = [str(word) for name, value in (given | more).items() for word in (f"--{name}", value)]
    words += ["--rl", "sampling.batch_size=4", "sampling.max_new_tokens=5", "optim.lr=0.01"]
    assert main(words) == 1  # one seed has no interval
    first = json.loads((tmp_path / "out.json").read_text())
    assert set(first["parts"]) == {"start", "ppo 0", "ptx 0"}
    assert first["parts"]["ptx 0"]["nll"] < first["parts"]["ppo 0"]["nll"]  # these very texts are learned
    capsys.readouterr()
    assert main([*words, "--seeds", "2"]) in (0, 1)
    second = json.loads((tmp_path / "out.json").read_text())
    assert second["parts"].items() >= first["parts"].items() and second["compared"]["seeds"] == [0, 1]
    assert "seed 1, PPO-ptx" in capsys.readouterr().out
