"""The benchmark of ABC's cost on tiny models: its fields and counts, never a time."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks import abc_cost
from commands import Server
from scripts import run_benchmark

from apportion.models.attention.row import attention_row

TINY = ["--random", "llama-tiny", "--tokens", "40", "90", "--pairs", "3", "--repetitions", "4", "--threads", "1"]
LENGTHS = (40, 90)  # neither is the size of a head nor of anything else in the model


@pytest.fixture(autouse=True)
def same_threads() -> Iterator[None]:
    """The benchmark sets the number of threads; put it back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def tiny_model(*more: str) -> Any:
    return abc_cost.build(abc_cost.parse([*TINY, *more]))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_reports_every_figure_of_every_length(capsys: pytest.CaptureFixture[str], dtype: str) -> None:
    assert abc_cost.main([*TINY, "--dtype", dtype, "--batch", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["model"], found["dtype"], found["threads"], found["batch"]) == ("llama-tiny", dtype, 1, 2)
    assert [row["tokens"] for row in found["lengths"]] == list(LENGTHS)
    for row in found["lengths"]:
        assert row["repetitions"] == 4 and row["pairs"] == 3
        assert row["forward_s"] > 0 and row["alone_s"] > 0
        assert row["alone_ratio"] == pytest.approx(row["alone_s"] / row["forward_s"])
        for name in ("paired", "null"):
            assert row[f"{name}_ratio_low"] <= row[f"{name}_ratio"] <= row[f"{name}_ratio_high"]
            assert row[f"{name}_ratio"] == pytest.approx(row[f"{name}_s"] / row["forward_s"])
        assert row["extra_square"] == 0, "a T×T tensor was added"
        assert 0 < row["extra_bytes"] < 2 * row["square_bytes"] * 4  # two sequences, four heads


@pytest.mark.parametrize("length", LENGTHS)
def test_a_square_matrix_would_be_noticed(length: int) -> None:
    """A softmax over all T rows, which ABC avoids."""
    model = tiny_model()
    inputs = {
        "input_ids": torch.randint(2, 400, (1, length)),
        "attention_mask": torch.ones(1, length, dtype=torch.long),
    }

    def plain() -> None:
        with torch.no_grad():
            model(**inputs)

    def every_row() -> None:
        with torch.no_grad(), attention_row(model) as tap:
            model(**inputs)
        tap.weights(torch.arange(length)[None])

    found = abc_cost.memory(plain, every_row, length)
    assert found["extra_square"] > 0 and found["extra_bytes"] >= 4 * length * length * 4
    assert abc_cost.memory(plain, lambda: (plain(), torch.zeros(3).exp()), length)["extra_square"] == 0


def test_the_operations_timed_alone_are_those_of_a_credit() -> None:
    """One row of the last layer, head mean, normalised: equal to eager attention's."""
    model = tiny_model()
    ids, mask = torch.randint(2, 400, (2, 40)), torch.ones(2, 40, dtype=torch.bool)
    inputs = {"input_ids": ids, "attention_mask": mask.long()}
    with torch.no_grad(), attention_row(model) as tap:
        model(**inputs)
    alpha = abc_cost.finish(tap, torch.full((2,), 39), mask)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        expected = model(**inputs, output_attentions=True).attentions[-1][:, :, -1].mean(dim=1)
    torch.testing.assert_close(alpha, expected, rtol=0, atol=1e-6)
    assert len(abc_cost.timed_alone(tiny_model(), inputs, torch.full((2,), 39), mask, 3)) == 3


def test_runs_are_interleaved_and_their_interval_is_the_medians() -> None:
    order: list[str] = []
    times = abc_cost.rounds([lambda name=name: order.append(name) for name in "abc"], 4)
    assert "".join(order) == "abcbcacababc" and [len(t) for t in times] == [4, 4, 4]
    found = abc_cost.difference("x", [1.0, 2.0, 3.0], [1.5, 2.25, 4.0], total=10.0)
    assert found == {"x_s": 0.5, "x_ratio": 0.05, "x_ratio_low": 0.025, "x_ratio_high": 0.1}
    assert abc_cost.median_interval([float(i) for i in range(15)]) == (3.0, 11.0)  # 96.5% by the binomial
    assert abc_cost.median_interval([3.0, 1.0, 2.0]) == (1.0, 3.0)


def test_the_script_prints_a_table(heavy: Server, tmp_path: Path) -> None:
    done = run_benchmark("abc_cost", *TINY, folder=tmp_path, heavy=heavy)
    assert done.code == 0, done.err
    assert "llama-tiny, float32, 1 threads" in done.out and done.out.count("no T×T tensor") == 2
    assert "Traceback" not in done.err


def test_the_updates_rate_and_numbers(heavy: Server, tmp_path: Path) -> None:
    """Operations counted by hand, and the small numerical effect of the shortcuts."""
    import tiny

    folder = tiny.save_policy(tmp_path / "policy")
    words = ["--model", folder, "--rows", 4, "--prompt", 5, "--response", 7, "--repeats", 1, "--micro_tokens", 24]
    words += ["--matmul_sizes", 128]
    done = run_benchmark("update_speed", *words, "--threads", 1, "--json", folder=tmp_path, heavy=heavy)
    assert done.code == 0, done.err
    found = json.loads(done.out)
    attention, gated, head = 32 * (32 + 16 + 16 + 32), 3 * 32 * 64, 400 * 32  # weights of a layer's parts
    tokens, layers = 4 * 12, 2
    full = 6 * tokens * layers * (attention + gated) + 6 * 4 * 7 * head
    assert found["settings"]["all weights"]["operations"] == full
    frozen = 4 * tokens * layers * (attention + gated) + 4 * 4 * 7 * head
    thin = 6 * tokens * layers * 16 * (32 + 32 + 32 + 16 + 32 + 16 + 32 + 32)  # A and B of q, k, v and o
    assert found["settings"]["adapters"]["operations"] == frozen + thin
    assert 0 < found["settings"]["adapters"]["least"] <= found["settings"]["adapters"]["ratio"]
    assert found["numbers"]["shortcuts"] < 1e-5 and 0 < found["numbers"]["bfloat16"] < 0.05
