"""The comparison of LoRA and full training: pairs, bytes and figures by hand, and the command on tiny models."""

from __future__ import annotations

import csv
import json
import random
from pathlib import Path

import pytest
import tiny
import torch
from benchmarks.harness.stored import load_parts, named, save_parts
from benchmarks.lora_or_full import figures
from benchmarks.lora_or_full.__main__ import main
from benchmarks.lora_or_full.pairs import beginning, make_pairs
from benchmarks.lora_or_full.process import TrainedBytes

from apportion.data import Labelled
from apportion.errors import ConfigError, DataError


def reviews(count: int = 300) -> list[Labelled]:
    """Return reviews that begin differently, half of them positive."""
    numbers = random.Random(0)
    return [Labelled(f"{numbers.randrange(10**6)} {tiny.TEXTS[i % 4]}", (i + 1) % 2) for i in range(count)]


def test_pairs_are_equally_long_and_use_a_review_once() -> None:
    rows, tokenizer = reviews(), tiny.tokenizer()
    pairs = make_pairs(rows, tokenizer, 40, (8, 20), seed=0)
    assert len({text for pair in pairs for text in pair.values()}) == 80
    for pair in pairs:
        sizes = [len(tokenizer(pair[name], add_special_tokens=False)["input_ids"]) for name in ("chosen", "rejected")]
        assert sizes[0] == sizes[1] and 8 <= sizes[0] <= 20
        for name, label in (("chosen", 1), ("rejected", 0)):
            assert {row.label for row in rows if row.text.startswith(pair[name])} == {label}
    assert make_pairs(rows, tokenizer, 40, (8, 20), seed=0) == pairs
    assert make_pairs(rows, tokenizer, 40, (8, 20), seed=1) != pairs
    with pytest.raises(DataError, match="400 of them"):
        make_pairs(rows, tokenizer, 400, (8, 20), seed=0)
    assert beginning("short", tokenizer, 50) is None


def test_bytes_are_those_of_the_optimizer_counted_by_hand() -> None:
    own, other = torch.nn.Linear(3, 2), torch.nn.Linear(4, 1, bias=False).to(torch.bfloat16)
    unused = torch.nn.Parameter(torch.zeros(5))
    parts = {"policy": [*own.parameters(), unused], "critic": list(other.parameters())}
    optimizer = torch.optim.AdamW([p for part in parts.values() for p in part])
    counter = TrainedBytes(lambda: parts)
    try:
        for _ in range(2):
            loss = own(torch.ones(1, 3)).sum() + other(torch.ones(1, 4, dtype=torch.bfloat16)).float().sum()
            loss.backward()
            optimizer.step()
            first = json.dumps(counter.counted)
            unused.grad = torch.ones(5)  # the second step is not counted
        assert json.dumps(counter.counted) == first
    finally:
        counter.close()
    # 8 weights of 4 bytes that step and 5 that do not: two moments of 8 and a count of 4 bytes for each of two tensors
    policy = {"weights": 13, "weight_bytes": 52, "gradient_bytes": 32, "state_bytes": 2 * 32 + 2 * 4}
    critic = {"weights": 4, "weight_bytes": 8, "gradient_bytes": 8, "state_bytes": 2 * 8 + 4}
    assert counter.counted == {"policy": policy, "critic": critic}


def test_the_accuracies_differ_by_what_is_counted_by_hand() -> None:
    lora, full = [1.0] * 90 + [0.0] * 10, [1.0] * 89 + [0.0] * 11
    found = figures.compared(lora, full)
    assert found["LoRA"]["mean"] == 0.9 and found["full"]["mean"] == 0.89 and found["pairs"] == 100
    # one of 100 differences is 1: mean 0.01, sd 0.1, half of the interval 1.96 · 0.1/10
    assert found["difference"]["mean"] == pytest.approx(0.01)
    assert found["difference"]["high"] == pytest.approx(0.01 + 1.959964 * 0.01)
    assert found["passed"] and figures.compared(full, lora)["passed"]
    apart = [1.0] * 87 + [0.0] * 13
    assert not figures.compared(lora, apart)["passed"] and not figures.compared(apart, lora)["passed"]
    assert figures.accuracy([1.0, 0.5, 0.0])["mean"] == pytest.approx(0.5)


def test_the_table_adds_bytes() -> None:
    def part(*names: str) -> dict[str, object]:
        bytes_of = {"weights": 1000, "weight_bytes": 4000, "gradient_bytes": 2000, "state_bytes": 8_000_000}
        return {"trained": dict.fromkeys(names, bytes_of), "peak_mb": 1234.5}

    rows = figures.rows_of({"reward LoRA": part("all"), "separate full": part("policy", "critic")})
    assert [(row["what"], row["side"]) for row in rows] == [
        ("reward model", "LoRA"),
        ("critic with a trunk of its own", "full"),
    ]
    assert all(row["bytes"] == 8_006_000 for row in rows)
    assert "| reward model, LoRA | 1,000 | 0.00 | 0.00 | 8.00 | 8.01 | 1,234 |" in figures.table(rows)


def test_parts_of_other_settings_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "new" / "out.json"
    assert load_parts(path, {"seed": 0}) == {}
    save_parts(path, {"seed": 0}, {"a": 1}, more=2)
    assert load_parts(path, {"seed": 0}) == {"a": 1}
    with pytest.raises(ConfigError, match="--seed") as caught:
        load_parts(path, {"seed": 1})
    assert "another --output" in str(caught.value)
    with pytest.raises(ConfigError, match="--batch"):
        load_parts(path, {"seed": 0, "batch": 4})
    before = named(str(path))
    path.write_text("[1]")
    with pytest.raises(ConfigError, match="that this benchmark wrote"):
        load_parts(path, {"seed": 0})
    assert named(str(path)) != before and (named("imdb"), named(None)) == ("imdb", None)


@pytest.mark.long  # six processes
def test_the_command_runs_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny.save_policy(tmp_path / "policy")
    tiny.save_prompts(tmp_path / "prompts.jsonl")
    with (tmp_path / "reviews.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("text", "label"), *((row.text, row.label) for row in reviews())])
    output = tmp_path / "out.json"
    words = [
        "--model",
        tmp_path / "policy",
        "--data",
        tmp_path / "reviews.csv",
        "--prompts",
        tmp_path / "prompts.jsonl",
    ]
    words += ["--pairs", 24, "--test", 10, "--tokens", 8, 12, "--batch", 8, "--threads", 1]
    words += ["--folder", tmp_path / "runs", "--output", output]
    words += ["--rl", "sampling.batch_size=4", "sampling.max_new_tokens=5"]
    code = main([str(word) for word in words])
    shown, found = capsys.readouterr().out, json.loads(output.read_text())
    assert code == (0 if found["compared"]["passed"] else 1) and "10 test pairs" in shown, shown
    assert len(found["parts"]) == 6 and len(found["table"]) == 8
    by_name = {(row["what"], row["side"]): row for row in found["table"]}
    assert by_name["critic on the policy's trunk", "LoRA"]["weights"] == 33  # a head of 32 and its bias
    for what in ("reward model", "policy", "critic with a trunk of its own"):
        assert 0 < by_name[what, "LoRA"]["weights"] < by_name[what, "full"]["weights"]
        assert by_name[what, "full"]["peak_mb"] > 50
    before = sorted((tmp_path / "runs").glob("*.log"))
    for path in before:
        path.unlink()
    assert main([str(word) for word in words]) == code and capsys.readouterr().out == shown
    assert len(before) == 6 and not list((tmp_path / "runs").glob("*.log"))  # nothing ran again
    assert main([*(str(word) for word in words), "--seed", "1"]) == 2
    assert "another --output" in capsys.readouterr().err
