"""`benchmarks.speed` on tiny models: refused settings, counts, and real runs of both sides."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from benchmarks import speed
from benchmarks.harness import environment, figures, machine, workload
from benchmarks.harness.operations import FORMULAS
from benchmarks.harness.ours import rl_config
from benchmarks.harness.recorder import Recorder, peak_rss
from benchmarks.harness.settings import PEERS, SpeedConfig, Work, check, shaped
from commands import Result
from scripts import run_benchmark
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from apportion.cli.main import main
from apportion.errors import ConfigError, DataError
from apportion.models.fast import onednn

WORDS = ("a", "the", "in", "of", "and", "good", "bad", "film", "story", "heart", "music", "cast", "jokes", "time")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model and many prompts that begin differently."""
    folder = tmp_path_factory.mktemp("bench")
    tiny.save_policy(folder / "model")
    rows = [f"{a} {b} {text}" for a in WORDS for b in WORDS[:5] for text in tiny.TEXTS[:1] if a != b]
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": row}) + "\n" for row in rows))
    return folder


def make_work(world: Path, folder: Path, **changes: Any) -> Work:
    """Return ours on the tiny model: two timed batches of four rollouts."""
    fields: dict[str, Any] = {"role": "ours", "model": str(world / "model"), "folder": str(folder), "algorithm": "ppo"}
    fields |= {"reward": str(folder / "reward"), "prompts": str(world / "prompts.jsonl"), "lr": 1e-3, "batch": 4}
    fields |= {"samples": 1, "prompt_tokens": 3, "new_tokens": 5, "epochs": 2, "mini_batch": 2, "micro_batch": 2}
    fields |= {"threads": 1, "device": "cpu", "pad_token": None, "seed": 0, "batches": 2}
    return Work(**fields | changes)


# --- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "pieces"),
    [
        (["--peer", "trl-pp"], ["peer: got 'trl-pp'", "Did you mean 'trl-ppo'"]),
        (["--ours", "half"], ["ours: got 'half'", "default, full"]),
        (["--peer_precision", "float16"], ["peer_precision: got 'float16'", "autocast"]),
        (["--batchez", "3"], ["unrecognized arguments: --batchez"]),
        (["--batches", "many"], ["batches", "int", "many"]),
        (["--batches", "0"], ["batches: got 0", ">= 1"]),
        (["--rounds", "7"], ["rounds: got 7", "at most batches (6)"]),
        (["--threads", "0"], ["threads: got 0", ">= 1"]),
        (["--new_tokens", "0"], ["new_tokens: got 0", ">= 1"]),
        (["--samples", "4"], ["samples: got 4", "trl-ppo samples each prompt once"]),
        (["--peer", "trl-grpo", "--samples", "5"], ["samples: got 5", "a divisor of batch (32)"]),
        (["--mini_batch", "5"], ["mini_batch: got 5", "a divisor of batch (16)"]),
        (["--mini_batch", "8", "--peer_micro_batch", "4"], ["peer_micro_batch: got 4", "cannot accumulate"]),
        (["--ours_settings", "[ppo.epochs]"], ["ours_settings: got 'ppo.epochs'", '"name=value"']),
        (["--output", ""], ["output: got ''", "a file name"]),
        (["--fresh"], ["unrecognized arguments: --fresh"]),
    ],
)
def test_a_wrong_flag_is_named(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: list[str], pieces: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    try:
        code = speed.main(flags)
    except SystemExit as end:  # of the parser
        code = end.code
    printed = capsys.readouterr()
    assert code == 2 and printed.out == ""
    assert all(piece in printed.err for piece in pieces), printed.err
    assert list(tmp_path.iterdir()) == []


def test_settings_of_ours_are_checked_before_anything_is_installed(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, world: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for text, piece in (("ppo.epoch=1", "Did you mean 'ppo.epochs'"), ("algorithm=abcd", "Did you mean 'abc-d'")):
        assert speed.main(["--model", str(world / "model"), "--ours_settings", f"[{text}]"]) == 2
        assert piece in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        speed.main(["--help"])
    printed = capsys.readouterr().out
    assert done.value.code in (0, None)
    assert all(piece in printed for piece in ("examples:", "time_ratio", "--peer_precision"))


def test_the_former_command_names_the_new_one(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["bench"], ["bench", "speed", "--batches", "3"]):
        assert main(words) == 2
        assert "python -m benchmarks.speed" in capsys.readouterr().err


def test_the_shape_is_the_peers_where_no_flag_sets_it() -> None:
    for name, peer in PEERS.items():
        config = shaped(SpeedConfig(peer=name, new_tokens=7))
        check(config)
        assert config.new_tokens == 7 and config.batch == config.mini_batch == peer.shape["batch"]
    assert shaped(SpeedConfig(mini_batch=8)).peer_micro_batch == 8


def test_ours_is_full_or_our_defaults(world: Path, tmp_path: Path) -> None:
    full, default = rl_config(make_work(world, tmp_path)), rl_config(make_work(world, tmp_path, ours="default"))
    assert (full.algorithm, full.lora.rank, full.ppo.value_model, full.optim.lr) == ("ppo", 0, "reward", 1e-3)
    assert (default.algorithm, default.lora.rank, default.ppo.value_model) == ("red", 16, "shared")
    assert full.sampling.prompt_tokens == [3, 3] and full.log_rollouts == full.checkpoint_every == 0 == len(
        full.compare
    )
    grouped = rl_config(make_work(world, tmp_path, algorithm="grpo", samples=2, ours="default"))
    assert (grouped.algorithm, grouped.sampling.samples_per_prompt, grouped.lora.rank) == ("grpo", 2, 16)
    changed = rl_config(make_work(world, tmp_path, overrides=["optim.lr=1e-6", "dtype=float32", "ppo.epochs=3"]))
    assert (changed.optim.lr, changed.dtype, changed.ppo.epochs) == (1e-6, "float32", 3)
    for text, piece in (("ppo.epoch=1", "Did you mean 'ppo.epochs'"), ("dtype=half", "dtype: got 'half'")):
        with pytest.raises(ConfigError, match="got") as error:
            rl_config(make_work(world, tmp_path, overrides=[text]))
        assert piece in str(error.value)


# --- what is counted --------------------------------------------------------------------------------------------------


class Linear(torch.autograd.Function):
    """A linear layer whose gradients are written by hand, one of them in place."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight.T

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return grad @ weight, torch.zeros_like(weight).addmm_(grad.T, x)


def counted(call: Any) -> int:
    with FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter:
        call()
    return counter.get_total_flops()


def test_products_of_custom_autograd_functions_are_counted() -> None:
    x, weight = torch.randn(6, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    once = 2 * 6 * 4 * 5
    assert counted(lambda: Linear.apply(x, weight)) == once
    assert counted(lambda: Linear.apply(x, weight).sum().backward()) == 3 * once
    layer = nn.Linear(4, 5)
    assert counted(lambda: layer(x).sum().backward()) == 3 * once
    assert counted(lambda: torch.mm(x.detach(), weight.detach().T, out=torch.empty(6, 5))) == once
    left, right = torch.randn(3, 6, 4), torch.randn(3, 4, 5)
    assert counted(lambda: torch.zeros(3, 6, 5).baddbmm_(left, right)) == 3 * once == counted(lambda: left @ right)


def test_products_of_the_fast_layers_are_counted() -> None:
    x, weight = torch.randn(6, 512, requires_grad=True), torch.randn(256, 512, requires_grad=True)
    once = 2 * 6 * 512 * 256
    assert counted(lambda: onednn.linear(x, weight, None)) == once
    assert counted(lambda: onednn.linear(x, weight, None).sum().backward()) == 3 * once
    frozen = weight.detach()
    assert counted(lambda: onednn.linear(x, frozen, None).sum().backward()) == 2 * once
    assert counted(lambda: onednn.product(x.detach()[:, :256], frozen)) == 2 * 6 * 256 * 512
    if onednn.can_pack_to_sample(frozen):
        packed = onednn.pack(frozen)
        assert counted(lambda: onednn.onednn_product(x.detach(), packed, None)) == once


@pytest.mark.parametrize("kv", [4, 2])
def test_attention_on_a_cpu_is_counted(kv: int) -> None:
    query = torch.randn(2, 4, 6, 8, requires_grad=True)
    key, value = (torch.randn(2, kv, 6, 8, requires_grad=True) for _ in range(2))

    def attend() -> Tensor:
        return nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=kv != 4)

    pairs = 2 * 4 * 6 * 6
    assert counted(attend) == 2 * pairs * (8 + 8)
    assert counted(lambda: attend().sum().backward()) == 2 * pairs * 16 + 2 * pairs * 5 * 8


@pytest.fixture
def recorder(tmp_path: Path, world: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Recorder]:
    """A recorder of one warm-up, two timed batches and a counted one, its clock a counter, its hooks taken back."""
    from torch.optim import optimizer

    before = [dict(hooks) for hooks in (optimizer._global_optimizer_pre_hooks, optimizer._global_optimizer_post_hooks)]
    made = Recorder(make_work(world, tmp_path, count=True))
    ticks = iter(range(10_000))
    monkeypatch.setattr(made, "_now", lambda: float(next(ticks)))
    made.begin()
    yield made
    for hooks, earlier in zip(
        (optimizer._global_optimizer_pre_hooks, optimizer._global_optimizer_post_hooks), before, strict=True
    ):
        hooks.clear()
        hooks.update(earlier)


def test_phases_exclude_what_is_inside_them(recorder: Recorder) -> None:
    """Every reading of the clock is one second: 0 begins the batch, 1 and 4 score, 2 and 3 the reference in it."""
    recorder.batch_done()  # the warm-up
    recorder.enter("score")
    recorder.enter("reference")
    recorder.leave()
    recorder.leave()
    recorder.open("update")
    recorder.open("update")
    assert recorder.inside("update") and not recorder.inside("score")
    recorder.batch_done()
    (batch,) = recorder.batches
    assert batch["phases"] == {"generate": 0, "score": 2, "reference": 1, "update": 1, "other": 3}
    assert batch["total"] == 7


@pytest.mark.parametrize(("dtype", "changed"), [(torch.float32, 1.0), (torch.bfloat16, 0.0)])
def test_steps_work_operations_and_changed_weights_are_recorded(
    recorder: Recorder, dtype: torch.dtype, changed: float
) -> None:
    """Steps of 1e-4 on weights of 1: all are seen in float32, none in bfloat16, whose next number is 0.0078 away."""
    weight = nn.Parameter(torch.ones(4, 3, dtype=dtype))
    optimizer = torch.optim.SGD([weight], lr=1e-4)
    last = []
    for _ in range(4):
        recorder.add(trained_tokens=5)
        (torch.ones(2, 3, dtype=dtype) @ weight.T).sum().backward()
        for _ in range(2):
            optimizer.step()
        optimizer.zero_grad()
        last.append(recorder.batch_done())
    assert last == [False, False, False, True] and len(recorder.batches) == 2
    assert [b["work"]["trained_tokens"] for b in recorder.batches] == [5, 5]
    assert [b["work"]["optimizer_steps"] for b in recorder.batches] == [2, 2]
    assert recorder.changed == changed
    assert recorder.flop["total"] == 2 * (2 * 2 * 3 * 4) and recorder.peak["rss_mb"] > 10
    recorder.save(more=1)
    result = json.loads((Path(recorder.work.folder) / "result.json").read_text())
    assert result["versions"]["torch"] == torch.__version__ and result["more"] == 1


def test_a_missing_function_is_an_error(recorder: Recorder) -> None:
    with pytest.raises(ConfigError, match="without no_such_function"):
        recorder.wrap(figures, "no_such_function", "score")


def test_peak_memory_is_this_process_alone() -> None:
    """In a process whose parent has used far more: only its own 240 MB are counted."""
    large = torch.ones(60_000_000)
    code = (
        "import torch; from benchmarks.harness.recorder import peak_rss; a = peak_rss(); x = torch.ones(60_000_000); "
    )
    done = subprocess.run(
        [sys.executable, "-c", code + "print(a, peak_rss() - a)"],
        env=environment.environment(1),
        capture_output=True,
        text=True,
    )
    before, more = map(float, done.stdout.split())
    assert before < peak_rss() and 200 < more < 300 and len(large)


# --- figures ----------------------------------------------------------------------------------------------------------


def side(seconds: list[float], peak: float, **work: int) -> dict[str, Any]:
    counts = dict.fromkeys(figures.WORK, 10) | work
    phases = dict.fromkeys(figures.PHASES, 0.5)
    batches = [{"total": s, "phases": phases, "work": counts} for s in seconds]
    return {"batches": batches, "peak": {"rss_mb": peak, "gpu_mb": 0.0}, "flop": {"total": 8e9, "update": 1e9}} | {
        "changed": 0.5,
        "versions": {},
    }


def test_medians_ratios_and_rates_by_hand() -> None:
    rates = {"float32_flops": 4e9, "bfloat16_flops": 16e9}
    ours = figures.summarise([side([1.0, 2.0], 100), side([3.0], 120)], rates, cuda=False)
    assert ours["seconds"] == {"median": 2.0, "min": 1.0, "max": 3.0} and ours["batches"] == 3
    assert ours["work"]["trained_tokens"] == 30
    assert ours["flops"]["total"] == {"flops": 4e9, "of_float32": 1.0, "of_bfloat16": 0.25}
    assert ours["flops"]["update"]["flops"] == 2e9
    assert ours["tokens_per_s"] == {
        "generated_in_generate": 20.0,
        "generated_in_all": 5.0,
        "trained_in_update": 20.0,
    }
    assert ours["memory_mb"] == {"median": 110, "min": 100, "max": 120}
    assert figures.ratio([6.0, 8.0], [2.0, 4.0]) == {"median": 2.5, "min": 1.5, "max": 4.0}


def test_a_ratio_of_different_work_is_refused() -> None:
    same = dict.fromkeys(figures.WORK, 10)
    figures.check_same_work(same, dict(same))
    for name in figures.WORK:
        with pytest.raises(DataError, match=f"{name.replace('_', ' ')}: ours 9, peer 10") as error:
            figures.check_same_work(same | {name: 9}, same)
        assert "No ratio is given" in str(error.value)


# --- the machine, the prompts, the environment ------------------------------------------------------------------------


def test_the_machine_is_described() -> None:
    result = machine.describe()
    assert result["cpu"] and result["memory_gb"] > 0.1 and 1 <= result["usable_cores"] <= result["cores"]
    assert result["packages"]["torch"] == torch.__version__
    assert machine.matmul_rate(torch.float32, seconds=0.0, sizes=[512]) > 1e8
    assert machine.read_bandwidth(seconds=0.0) > 1e8


def test_prompts_are_different_and_exact(world: Path, tmp_path: Path) -> None:
    tokenizer = tiny.tokenizer()
    path = workload.write_prompts(str(world / "prompts.jsonl"), tokenizer, 3, 9, tmp_path / "out.jsonl")
    texts = [json.loads(line)["prompt"] for line in path.read_text().splitlines()]
    assert len(set(texts)) == 9 and {len(tokenizer(text)["input_ids"]) for text in texts} == {3}
    with pytest.raises(DataError, match="prompts of exactly 90 tokens"):
        workload.write_prompts(str(world / "prompts.jsonl"), tokenizer, 90, 2, tmp_path / "out.jsonl")


def test_a_package_that_cannot_be_installed_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(ConfigError, match="trl==1.12.0: pip failed") as error:
        environment.installed(PEERS["trl-ppo"])
    assert "PIP_FIND_LINKS" in str(error.value)
    assert list((tmp_path / "apportion" / "bench").iterdir()) == []


# --- processes --------------------------------------------------------------------------------------------------------


def test_our_side_runs_and_counts_its_work(world: Path, tmp_path: Path) -> None:
    workload.save_reward(str(world / "model"), tmp_path / "reward", None, 0)
    work = make_work(world, tmp_path, count=True)
    result = speed.process(work, PEERS["trl-ppo"], tmp_path, "ours-0")
    assert len(result["batches"]) == 2 and "trl" not in result["versions"]
    expected = {"prompts": 4, "prompt_tokens": 12, "generated_tokens": 20, "trained_tokens": 40, "optimizer_steps": 4}
    for batch in result["batches"]:
        assert batch["work"] == expected
        assert min(batch["phases"].values()) > 0 and sum(batch["phases"].values()) == pytest.approx(batch["total"])
    flop, logged = result["flop"], result["logged"]
    assert flop["total"] == pytest.approx(sum(flop[p] for p in ("generate", "score", "reference", "update")), rel=0.01)
    assert flop["update"] > flop["score"] > flop["reference"] > 0
    assert 0 < result["changed"] <= 1 and result["peak"]["rss_mb"] > 50
    assert logged["time/total"] > 0 and logged["memory/rss_mb"] > 50
    assert not (tmp_path / "ours-0" / "run" / "final").exists()


def test_a_failed_process_is_an_error(world: Path, tmp_path: Path) -> None:
    work = make_work(world, tmp_path, overrides=["ppo.epoch=1"])
    with pytest.raises(ConfigError, match="Did you mean 'ppo.epochs'"):
        speed.process(work, PEERS["trl-ppo"], tmp_path, "ours-1")
    absent = PEERS["trl-ppo"]._replace(module="benchmarks.peers.absent")
    with pytest.raises(ConfigError, match="exit code 1: .*No module named") as error:
        speed.process(replace(work, role="peer"), absent, tmp_path, "peer-0")
    assert "trl==1.12.0 in float32" in str(error.value) and "--peer_precision" in str(error.value)


# --- with the peers' packages -----------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def command(world: Path, cache: Path, *flags: object) -> Result:
    """Run the real command on the tiny model."""
    shape = ["--threads", 1, "--device", "cpu", "--prompt_tokens", 3, "--new_tokens", 5, "--output", cache / "out.json"]
    inputs = ["--model", world / "model", "--prompts", world / "prompts.jsonl"]
    return run_benchmark("speed", *inputs, *shape, *flags, folder=cache, XDG_CACHE_HOME=str(cache), HF_HUB_OFFLINE="0")


@pytest.mark.long
@pytest.mark.peers
@pytest.mark.parametrize(
    ("peer", "flags", "steps"),
    [
        ("trl-ppo", ["--batch", 4, "--epochs", 2, "--batches", 5, "--peer_precision", "float32"], 2),
        ("trl-ppo", ["--batch", 4, "--mini_batch", 2, "--ours", "default", "--peer_precision", "bfloat16"], 8),
        ("trl-grpo", ["--batch", 8, "--samples", 4, "--batches", 2, "--rounds", 1], 1),
        ("trl-rloo", ["--batch", 8, "--samples", 4, "--mini_batch", 4, "--batches", 2, "--rounds", 1], 2),
    ],
)
def test_both_sides_do_the_same_work(world: Path, cache: Path, peer: str, flags: list[object], steps: int) -> None:
    done = command(world, cache, "--peer", peer, *flags, "--json")
    assert done.code == 0, done.err
    result = json.loads(done.out)
    assert done.out.count("\n") == 1 and result == json.loads((cache / "out.json").read_text())
    for name in ("time_ratio", "memory_ratio"):
        assert set(result[name]) == {"median", "min", "max"}
        assert 0 < result[name]["min"] <= result[name]["median"] <= result[name]["max"]
    assert set(result["phases"]) == {"generate", "score", "reference", "update", "other"}
    for each in ("ours", "peer"):
        one = result[each]
        assert one["work"] == result["ours"]["work"]
        assert one["work"]["optimizer_steps"] == steps * one["batches"]
        assert min(one["phases"][name]["median"] for name in result["phases"]) > 0
        assert 0 < one["flop"]["update"] < one["flop"]["total"] and one["flops"]["update"]["flops"] > 0
        assert 0 <= one["weights_changed"] <= 1 and one["memory_mb"]["median"] > 50
    assert result["peer"]["versions"]["trl"] == PEERS[peer].version and "trl" not in result["ours"]["versions"]
    best = "--peer_precision" not in flags
    assert set(result["peer"]["trials"]) == ({"float32", "autocast", "bfloat16"} if best else set())
    assert result["machine"]["threads"] == 1 and result["rates"]["float32_flops"] > 0


@pytest.mark.long
@pytest.mark.peers
def test_a_difference_in_work_is_refused_and_a_table_is_printed_otherwise(world: Path, cache: Path) -> None:
    flags = ["--batch", 4, "--epochs", 1, "--batches", 1, "--rounds", 1, "--peer_precision", "float32"]
    done = command(world, cache, *flags, "--ours_settings", "[sampling.max_new_tokens=3]")
    assert done.code == 2 and done.out == ""
    assert "generated tokens: ours 12, peer 20" in done.err and "No ratio is given" in done.err
    stored = json.loads((cache / "out.json").read_text())
    assert "time_ratio" not in stored and "ours 12, peer 20" in stored["refused"]
    done = command(world, cache, *flags)
    assert done.code == 0, done.err
    for piece in ("ours (full)", "trl-ppo (float32)", "weights changed", "time_ratio", "Fewer than 5 timed batches"):
        assert piece in done.out
    assert "Traceback" not in done.err
