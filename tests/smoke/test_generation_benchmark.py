"""The benchmark of generation on a tiny model: its fields, counts by hand, and complete responses; never a time."""

from __future__ import annotations

import json

import pytest
import torch
from benchmarks import generation_speed

TINY = ["--random", "llama-tiny", "--rows", "4", "--prompt", "6", "--new", "5", "--rounds", "2", "--device", "cpu"]
TINY += ["--matmul_sizes", "128"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_reports_both_sides_and_the_bound_counted_by_hand(capsys: pytest.CaptureFixture[str], dtype: str) -> None:
    assert generation_speed.main([*TINY, "--dtype", dtype, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    # a layer: q and o 32×32, k and v 32×16, three of 32×64; the head 32×400
    weights = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64) + 32 * 400
    length = 6 + 5 / 2
    assert found["operations"] == 2 * weights * 4 + 4 * 4 * length * 2 * 4 * 8
    assert found["bytes"] == (weights + 2 * 4 * length * 2 * 2 * 8) * (4 if dtype == "float32" else 2)
    assert found["bound_s"] == max(found["bytes_s"], found["operations_s"])
    for name in ("ours", "generate"):
        row = found[name]
        assert row["step_low_s"] <= row["step_s"] <= row["step_high_s"]
        assert row["of_bound"] == pytest.approx(found["bound_s"] / row["step_s"])


def test_both_sides_generate_every_token() -> None:
    model = generation_speed.build(generation_speed.parse([*TINY, "--dtype", "float32"]))
    prompts = torch.randint(2, 400, (4, 6), generator=torch.Generator().manual_seed(0))
    batch = generation_speed.ours(model, prompts)(5)
    assert batch.mask.all() and batch.mask.shape == (4, 5) and torch.equal(batch.prompt_ids, prompts)
    assert generation_speed.peer(model, prompts)(5).shape == (4, 11)


def test_a_step_needs_two_tokens() -> None:
    with pytest.raises(SystemExit):
        generation_speed.parse(["--new", "1"])
