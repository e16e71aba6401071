"""Frozen weights in a file: the same numbers, memory that is given back, and every place where they stay in memory."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny_runs
import torch
from torch import nn

from apportion.stages.rl.train import train
from apportion.system import file_weights as module
from apportion.system.file_weights import FileWeights, file_weights


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_runs.world(tmp_path_factory.mktemp("world"))


linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is given back on Linux only")


class Odd(nn.Module):
    """Tied weights, a transposed view, a buffer, 16 bit, an empty tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(33, 7, dtype=torch.bfloat16)
        self.two = nn.Linear(33, 7, bias=False)
        self.tied = nn.Linear(33, 7, bias=False)
        self.tied.weight = self.two.weight
        self.stored = nn.Parameter(torch.randn(5, 9).T)
        self.register_buffer("scale", torch.randn(3)[1:])
        self.empty = nn.Parameter(torch.empty(0, 4))


@linux
def test_every_tensor_keeps_its_values_strides_and_ties(tmp_path: Path) -> None:
    model = Odd()
    before = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    strides = {name: tensor.stride() for name, tensor in model.state_dict().items()}
    weights = FileWeights([model, model], tmp_path)
    weights.release()
    after = model.state_dict()
    assert {name for name in before if not torch.equal(before[name], after[name])} == set()
    assert {name: tensor.stride() for name, tensor in after.items()} == strides
    assert model.tied.weight is model.two.weight
    assert model.stored.data_ptr() % module.ALIGNMENT == 0
    kept = copy.deepcopy(model)
    with torch.no_grad():
        model.two.weight.add_(1)  # they can still be written
    assert torch.equal(model.tied.weight, before["two.weight"] + 1)
    assert torch.equal(kept.two.weight, before["two.weight"]), "a copy is a copy"
    assert list(tmp_path.iterdir()) == [], "the file has no name: nothing stays in the folder"


MEASURE = """
import sys, torch
from torch import nn
from pathlib import Path
from apportion.system.file_weights import file_weights
from apportion.system.memory import memory_mb
model = nn.Sequential(*(nn.Linear(2048, 2048) for _ in range(12))).requires_grad_(False)  # 201 MB
x = torch.randn(8, 2048)
expected, full = model(x), memory_mb()
weights = file_weights([model], Path(sys.argv[1]))
freed = memory_mb()
again, used = model(x), None
used = memory_mb()
weights.release()
print(full - freed, used - memory_mb(), weights.size / 1e6, float((again - expected).abs().max()))
"""


@linux
def test_the_memory_is_given_back(tmp_path: Path) -> None:
    if file_weights([Odd()], tmp_path) is None:
        pytest.skip("the folder for temporary files lies in memory")
    done = subprocess.run([sys.executable, "-c", MEASURE, str(tmp_path)], capture_output=True, text=True, check=True)
    freed, released, size, difference = map(float, done.stdout.split())
    assert size == pytest.approx(201, abs=1)
    assert freed > 0.9 * size
    assert released > 0.9 * size
    assert difference == 0


@linux
def test_where_it_saves_nothing_weights_stay_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Odd()
    where = model.two.weight.data_ptr()
    assert file_weights([model], Path("/dev/shm")) is None
    assert file_weights([model], tmp_path / "missing") is None
    monkeypatch.setattr(module.sys, "platform", "darwin")
    assert file_weights([model], tmp_path) is None
    assert model.two.weight.data_ptr() == where


@linux
def test_a_full_disk_leaves_them_in_memory(tmp_path: Path) -> None:
    import resource

    model = Odd()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, limits[1]))
    try:
        assert file_weights([model], tmp_path) is None
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@linux
def test_space_for_what_a_run_saves_is_left(tmp_path: Path) -> None:
    model = Odd()
    free = shutil.disk_usage(tmp_path).free
    assert file_weights([model], tmp_path, spare=2 * free) is None
    assert file_weights([model], tmp_path, spare=free / 2) is not None


@linux
def test_weights_that_are_written_in_pieces_are_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system writes at most 2 GiB at a time; here 100 bytes."""
    real = module.tempfile.TemporaryFile

    class Pieces:
        def __init__(self, **settings: Any) -> None:
            self.file = real(**settings)
            self.fileno, self.seek = self.file.fileno, self.file.seek

        def __enter__(self) -> Pieces:
            return self

        def __exit__(self, *error: object) -> None:
            self.file.close()

        def write(self, rest: memoryview) -> int:
            return int(self.file.write(rest[:100]))

    monkeypatch.setattr(module.tempfile, "TemporaryFile", Pieces)
    model = Odd()
    before = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    FileWeights([model], tmp_path)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("rank", [0, 4])
def test_a_run_gives_the_same_numbers(tmp_path: Path, world: Path, rank: int) -> None:
    logs = {}
    for offload in (True, False):
        output = tmp_path / str(offload)
        train(tiny_runs.config(world, output, offload_frozen=offload, **{"lora.rank": rank}))
        rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
        timed = ("time/", "memory/")
        logs[offload] = [{k: v for k, v in row.items() if not k.startswith(timed)} for row in rows]
    assert len(logs[True]) == 2
    assert logs[True] == logs[False]
