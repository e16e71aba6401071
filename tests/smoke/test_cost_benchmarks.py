"""The benchmarks of ABC's share of a batch and of response length on tiny models: fields and counts, never a time."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny
import torch
from benchmarks import abc_batch, length
from benchmarks.harness import measuring
from commands import Server
from scripts import run_benchmark

from apportion.models.reward import load_reward

TINY = ["--dtype", "float32", "--threads", "1"]
LENGTHS = (30, 60, 90, 120)


@pytest.fixture(autouse=True)
def same_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny.save_policy(tmp_path_factory.mktemp("model")))


def test_cost_of_abc_in_a_batch(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--rows", "3", "--new_tokens", "6", "--pairs", "2", "--repetitions", "3", "--limit_gb", "0.0018"]
    assert abc_batch.main([*TINY, "--model", model, *sizes, "--lengths", *map(str, LENGTHS), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["batch"], found["epochs"], found["pairs"], found["threads"]) == ([3, 6], 4, 2, 1)
    for name in ("batch_s", "abc_batch_s", "added_ratio"):
        assert 0 < found[name]["min"] <= found[name]["median"] <= found[name]["max"]
    # 3 rollouts, 4 heads of 8, 14 tokens: q·k and weights·v, a multiplication and an addition each; the counter agrees
    by_hand = 3 * 4 * 14 * 8 * 2 * 2
    operations = found["operations"]
    assert (
        operations["added_analytic"]
        == operations["added_counted"]
        == operations["abc"] - operations["sparse"]
        == by_hand
    )
    assert found["operations_ratio"] == by_hand / operations["sparse"] < 0.01


def test_abcs_memory_grows_with_the_length_and_the_other_ways_with_its_square(model: str, tmp_path: Path) -> None:
    options = abc_batch.parse([*TINY, "--lengths", *map(str, LENGTHS), "--limit_gb", "0.0009"])
    reward = load_reward(str(abc_batch.reward_model(model, tmp_path / "reward")), device="cpu")
    before = reward.model.config._attn_implementation
    found = abc_batch.memory(reward, options)
    assert reward.model.config._attn_implementation == before
    rows = {row["tokens"]: row for row in found["lengths"]}
    assert list(rows) == list(LENGTHS)
    # q (32 numbers), k and v (16 each) of the last layer outlive its attention; a T×T matrix would be 4·4·T² bytes
    for tokens, row in rows.items():
        assert 0 < row["abc_added_bytes"] <= (32 + 16 + 16 + 32) * 4 * tokens
    assert found["fit"]["abc"]["square_share"] < 0.05
    assert "output_attentions_skipped" in rows[120] and "more than 0.0009 GB" in rows[120]["output_attentions_skipped"]
    kept = {tokens: row["output_attentions_added_bytes"] for tokens, row in rows.items() if tokens != 120}
    assert kept[90] > 2 * 4 * 90 * 90 * 4 - rows[90]["plain_bytes"], "two layers of four heads"
    assert found["fit"]["output_attentions"]["square_share"] > 0.5


def test_peak_bytes_counts_live_tensors() -> None:
    with measuring.peak_bytes() as peak:
        for _ in range(3):
            first = torch.ones(100_000)
            second = torch.ones(50_000)
            del first, second
    assert 600_000 <= peak[0] < 640_000


def test_a_fit_finds_its_own_powers() -> None:
    line = measuring.fitted([128, 512, 2048], [7 + 3.0 * t for t in (128, 512, 2048)])
    assert line["per_token"] == pytest.approx(3.0) and line["square_share"] < 1e-9
    both = measuring.fitted([128, 512, 1024, 2048], [2.0 * t + 0.5 * t * t for t in (128, 512, 1024, 2048)])
    assert (both["per_token"], both["per_square"]) == pytest.approx((2.0, 0.5))
    assert both["square_share"] == pytest.approx(1024 / 1026)


def test_time_a_token_by_length(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert length.main([*TINY, "--model", model, "--shapes", "2x5", "2x40", "--micro_tokens", "40", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [(row["rows"], row["tokens"], row["batches"]) for row in found["lengths"]] == [(2, 5, 3), (2, 40, 1)]
    for row in found["lengths"]:
        for phase in ("generate", "score", "update", "batch"):
            figures = row[phase]
            assert figures["apart_s"] == pytest.approx(figures["s"] - figures["attention_s"])
            assert figures["token_ms"] == pytest.approx(figures["s"] / (2 * row["tokens"]) * 1e3)
        assert row["batch"]["s"] == pytest.approx(sum(row[p]["s"] for p in ("generate", "score", "update")))
        kept = row["tokens"] == 5  # its two rows are one micro-batch: the policy's forward begins the update
        assert row["score"]["attention_operations"] == (3 - kept) * by_hand(2, 8 + row["tokens"])  # reference, reward
        assert row["update"]["attention_operations"] == 3 * by_hand(2, 8 + row["tokens"])  # one pass, forward and back
        # the prompt at once with an unused column, then all tokens but the last over every column of the buffers: at
        # most as many as are ever needed, at first 32 beyond the prompt, and 32 more when those are full
        columns = {5: [14] * 4, 40: [41] * 32 + [73] * 7}[row["tokens"]]
        assert row["generate"]["attention_operations"] == by_hand(2, 9) + 2 * 2 * 4 * sum(columns) * (8 + 8) * 2
    short, long = found["lengths"]
    for name, ratio in found["ratio"].items():
        assert ratio["raw"] == pytest.approx(long[name]["token_ms"] / short[name]["token_ms"])
        assert ratio["apart"] == pytest.approx(long[name]["token_apart_ms"] / short[name]["token_apart_ms"])


def by_hand(rows: int, tokens: int) -> int:
    """Return the operations of causal attention in two layers of four heads of 8, counted pair by pair."""
    pairs = sum(1 for query in range(tokens) for key in range(tokens) if key <= query)
    return 2 * rows * 4 * pairs * (8 + 8) * 2


def test_unseen_attention_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="no attention call was seen in phase update"):
        length.phase_figures(length.Calls(), "update", 1.0, 1, 8)


def test_the_registry_is_restored() -> None:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as REGISTRY

    before = dict(REGISTRY._local_mapping)
    with pytest.raises(KeyError), length.recorded(length.Calls()):
        raise KeyError
    assert dict(REGISTRY._local_mapping) == before


@pytest.mark.parametrize(
    ("name", "more", "line"),
    [
        ("abc_batch", ["--rows", "2", "--pairs", "1", "--repetitions", "2", "--lengths", "20", "40", "80"], "ABC adds"),
        pytest.param(
            "length", ["--shapes", "2x4", "2x16"], "time a token at 16 over 4", marks=pytest.mark.long
        ),  # its figures are tested in this process
    ],
)
def test_the_scripts_print_tables(
    heavy: Server, model: str, tmp_path: Path, name: str, more: list[str], line: str
) -> None:
    done = run_benchmark(name, *TINY, "--model", model, *more, folder=tmp_path, heavy=heavy)
    assert done.code == 0, done.err
    assert line in done.out and "Traceback" not in done.err
    assert list(tmp_path.iterdir()) == []
