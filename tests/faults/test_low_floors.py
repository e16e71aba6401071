"""The lowest floors where nothing else leads: refusals, empty input, and systems that lack something."""

from __future__ import annotations

import ctypes
import json
import math
import os
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import Server
from safetensors import SafetensorError
from two_processes import run_pair

from apportion import Rollouts, credit, segments
from apportion.config import RLConfig
from apportion.distributed import collectives, error_relay, launch
from apportion.errors import ConfigError, DataError, DiskError, ScoreError
from apportion.intervals import proportion
from apportion.masking import previous_index
from apportion.registry import EvidenceKey, call, find
from apportion.segments import _boundaries
from apportion.system import cpu, disk, stderr
from apportion.system.heartbeat import _running as heartbeats
from apportion.system.heartbeat import heartbeat
from apportion.system.memory import PeakMemory, memory_mb
from apportion.testing import cases, violation
from apportion.types import Credit
from apportion.user_code import UserCode, keyword_names, validate_evidence

SHARES, STATISTICS = "shares sum to 1", "statistics are finite and add up"


def batch(mask: torch.Tensor, **evidence: torch.Tensor) -> Rollouts:
    rows, length = mask.shape
    return Rollouts(
        prompt_ids=torch.ones(rows, 1, dtype=torch.int64),
        prompt_mask=torch.ones(rows, 1, dtype=torch.bool),
        response_ids=torch.ones(rows, length, dtype=torch.int64),
        mask=mask,
        logprobs=torch.zeros(rows, length),
        group=torch.arange(rows),
        evidence=evidence,
    )


def test_a_failure_of_the_main_process_is_its_own_error(heavy: Server, tmp_path: Path) -> None:
    run_pair(heavy, "barrier_worker.py", tmp_path, folder=tmp_path)
    main, other = (json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in (0, 1))
    for case in ("main", "both"):
        assert main[case] == {"class": "DataError", "text": main["both"]["text"], "own": True}
        assert other[case]["class"] == "ProcessError" and "process 0 failed" in other[case]["text"]
    assert main["second"]["class"] == "DataError" and not main["second"]["own"] and "got 1" in main["second"]["text"]
    assert other["second"]["class"] == "ProcessError"
    assert main["none"] == other["none"] == main["empty sum"] == other["empty sum"] == main["relayed"] == {}
    assert other["relayed"]["shared"] and "column: got 'words'" in other["relayed"]["messages"][0]


def test_the_heartbeat_without_a_terminal_to_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", None)
    with heartbeat():
        assert len(heartbeats) == 1
    assert not heartbeats


def test_a_compiled_function_says_nothing_of_its_keywords() -> None:
    assert keyword_names(max) == (frozenset(), frozenset(), frozenset())


def test_a_label_that_is_written_as_a_number() -> None:
    assert RLConfig(positive_label=1).positive_label == "1"  # type: ignore[arg-type]


def test_a_device_that_the_launcher_does_not_give(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    with pytest.raises(ConfigError, match=r"device: got 'cuda'; expected cpu"):
        collectives._check_device(torch.device("cuda"))
    monkeypatch.delenv("ACCELERATE_USE_CPU")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(torch.cuda.device_count() + 1))
    with pytest.raises(ConfigError, match="processes: got"):
        collectives._check_device(torch.device("cuda"))
    collectives._check_device(torch.device("cpu"))


def test_gradients_go_in_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collectives, "BUCKET", 10)
    sizes = [4, 4, 4, 12, 1, 9]
    made = collectives._buckets([torch.nn.Parameter(torch.zeros(size)) for size in sizes])
    assert [[p.numel() for p in bucket] for bucket in made] == [[4, 4], [4], [12], [1, 9]]


def test_a_torch_without_what_sharding_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in launch.FSDP_OPTIONS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(launch, "FSDP_NEEDS", ("unshard", "no_such_method"))
    for name, (allowed, *_) in launch.FSDP_OPTIONS.items():
        if allowed:
            monkeypatch.setenv(name, allowed[0])
    with pytest.raises(ConfigError, match=r"torch: .*no_such_method"):
        launch.check_fsdp()


def test_the_store_of_a_main_process_that_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    class Gone:
        def add(self, key: str, amount: int) -> int:
            raise RuntimeError("connection reset")

    monkeypatch.setattr(torch.distributed.distributed_c10d, "_get_default_store", Gone)
    assert error_relay._is_first() is collectives.is_main() is True


def test_empty_input() -> None:
    assert proportion(0, 0) == {"mean": 0.0, "low": 0.0, "high": 1.0}
    empty = torch.zeros(2, 0, dtype=torch.bool)
    assert previous_index(empty).shape == (2, 0)
    assert _boundaries.order_in_turn(empty, None).shape == (2, 0)


def test_evidence_keys_keep_their_settings_in_a_pickle() -> None:
    key = EvidenceKey("process", function="mine:give", unit="step")
    again = pickle.loads(pickle.dumps(key))
    assert again == key and again.settings == key.settings and isinstance(again, EvidenceKey)


def test_a_factory_of_the_user_may_refuse_its_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "choosy.py").write_text(
        "from apportion.errors import ConfigError\n"
        "def make(size=1):\n"
        "    raise ConfigError('size', size, 'a larger one', 'Raise it.')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError) as caught:
        call("credit", "choosy:make", find("credit", "choosy:make", {}), {"size": 3})
    assert (caught.value.field, caught.value.got) == ("size", 3)


def test_a_system_without_a_c_library_to_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(name: Any) -> Any:
        raise OSError("no library")

    monkeypatch.setattr(ctypes, "CDLL", none)
    assert cpu.keep_freed_memory({}) is False
    cpu.return_freed_memory()


def test_a_full_disk_that_safetensors_reports(tmp_path: Path) -> None:
    text = "Error while serializing: I/O error: No space left on device (os error 28)"
    with pytest.raises(DiskError, match="No space left"), disk.explain_disk_errors(tmp_path):
        raise SafetensorError(text)
    with pytest.raises(SafetensorError, match="header too large"), disk.explain_disk_errors(tmp_path):
        raise SafetensorError("header too large")


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs a file system that cannot flush: /proc")
def test_folders_that_cannot_be_flushed_are_no_error_and_files_are() -> None:
    disk.sync(Path("/proc/self"))
    with pytest.raises(OSError, match="Invalid argument"):
        disk.sync(Path("/proc/self/status"))


def test_a_replacement_that_was_killed_is_finished_or_undone(tmp_path: Path) -> None:
    final = tmp_path / "final"
    old = disk.backup_of(final)
    disk.recover(final)  # nothing to do
    old.mkdir()
    (old / "weights").write_text("before")
    disk.recover(final)  # killed before the new one had its name
    assert (final / "weights").read_text() == "before" and not old.exists()
    old.mkdir()
    disk.recover(final)  # killed before the old one was removed
    assert (final / "weights").read_text() == "before" and not old.exists()


def test_peak_memory_sees_an_allocation() -> None:
    with PeakMemory() as memory:
        block = bytearray(os.urandom(1) * 80_000_000)
        while memory.peak_mb < memory_mb() * 0.9:
            pass
    assert memory.peak_mb >= 80 and len(block) == 80_000_000


@pytest.mark.skipif(sys.platform == "win32", reason="a pseudo-terminal is a Unix thing")
def test_text_for_a_terminal_only(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import pty

    leader, follower = pty.openpty()
    with os.fdopen(follower, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        stderr.write_to_terminal("shown")
        assert os.read(leader, 100) == b"shown"
    os.close(leader)
    with (tmp_path / "log").open("w") as log:
        monkeypatch.setattr(sys, "stderr", log)
        stderr.write_to_terminal("hidden")
    assert (tmp_path / "log").read_text() == ""


def test_settings_of_attention_that_cannot_be() -> None:
    with pytest.raises(ConfigError, match=r"attention.cap: got 0"):
        credit.attention(cap=0.0)
    with pytest.raises(ConfigError, match=r"policy_attention.view: got 'sideways'"):
        credit.policy_attention(view="sideways")


def test_boundaries_that_are_neither_true_nor_false() -> None:
    mask = torch.ones(2, 3, dtype=torch.bool)
    marks = torch.tensor([[1.0, 0.0, 1.0], [1.0, 0.5, 0.0]])
    with pytest.raises(DataError) as caught:
        segments.parsed()(batch(mask, boundaries=marks))
    assert (caught.value.row, caught.value.token, caught.value.got) == (1, 1, 0.5)


def test_evidence_of_a_function_is_checked() -> None:
    mask = torch.tensor([[True, False], [True, True]])
    for wrong in ([1.0], torch.tensor(1.0), torch.zeros(3)):
        with pytest.raises(DataError, match="whose first dimension is the batch|expected a tensor"):
            validate_evidence("mine", wrong, mask)
    with pytest.raises(ScoreError) as caught:
        validate_evidence("mine", torch.tensor([[0.0, math.nan], [0.0, math.inf]]), mask)
    assert caught.value.row == 1  # off the mask anything may stand


def test_a_time_limit_that_no_process_keeps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(ConfigError, match=r"monitors.timeout"):
        UserCode(timeout=5.0).call("mine:give", lambda: 1)


def violated(one: Credit, clause: str, **extra: Any) -> str:
    """Return the first message of one clause, "" where the credit satisfies it."""
    found = (violation(clause, one, case) for case in cases(one.needs, extra))
    return next((message for message in found if message is not None), "")


def test_the_contract_of_a_causal_credit_changes_flags_too() -> None:
    def flags(mask: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        return mask & (torch.rand(mask.shape, generator=generator) < 0.5)

    def flagged(rollouts: Rollouts, rewards: torch.Tensor, state: Any) -> tuple[torch.Tensor, Any]:
        return torch.where(rollouts.mask & rollouts.evidence["flags"], 1.0, 0.0).to(rewards), state

    def foreseen(rollouts: Rollouts, rewards: torch.Tensor, state: Any) -> tuple[torch.Tensor, Any]:
        later = rollouts.evidence["flags"].any(dim=1, keepdim=True)
        return torch.where(rollouts.mask & later, 1.0, 0.0).to(rewards), state

    causal = credit.uniform()._replace(
        assign=flagged, needs=frozenset({"flags"}), keeps_return=False, causal=True, share=None, stats=None
    )
    assert violated(causal, "causal as declared", flags=flags) == ""
    assert "declared causal" in violated(causal._replace(assign=foreseen), "causal as declared", flags=flags)


def test_the_contract_of_a_share_and_of_statistics() -> None:
    plain = credit.uniform()
    assert violated(plain, SHARES) == violated(plain, STATISTICS) == ""

    def lost(rollouts: Rollouts) -> torch.Tensor:
        return torch.where(rollouts.mask, 0.25, 0.0)

    def misplaced(rollouts: Rollouts) -> torch.Tensor:
        return torch.ones(rollouts.mask.shape)

    def endless(rollouts: Rollouts, *more: Any) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        return {"mine": (torch.tensor(math.inf), torch.tensor(1.0))}

    def squared(rollouts: Rollouts, *more: Any) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        return {"mine": (rollouts.mask.sum().float() ** 2, torch.tensor(1.0))}

    assert "not to 1" in violated(plain._replace(share=lost), SHARES)
    assert "not 0 off the mask" in violated(plain._replace(share=misplaced), SHARES)
    assert "inf" in violated(plain._replace(stats=endless), STATISTICS)
    assert "adds up to" in violated(plain._replace(stats=squared), STATISTICS)


def test_unknown_names_are_found_in_the_registry() -> None:
    assert find("credit", "uniform", credit.METHODS) is credit.METHODS["uniform"]
