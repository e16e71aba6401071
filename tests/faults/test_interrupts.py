"""The message after Ctrl-C: whether the same command resumes, by command."""

from __future__ import annotations

import io
from dataclasses import dataclass

import pytest
from benchmarks.harness.arguments import run_command

from apportion.cli.main import CHECKPOINTED, COMMANDS, after_interrupt, main
from apportion.config import DiagnoseConfig, DPOConfig, EvaluateConfig, RewardConfig, RLConfig, SFTConfig

SETTINGS = {
    "sft": SFTConfig,
    "dpo": DPOConfig,
    "rl": RLConfig,
    "reward": RewardConfig,
    "evaluate": EvaluateConfig,
    "diagnose": DiagnoseConfig,
}


class Interrupted(io.StringIO):
    """Standard input of a user who presses Ctrl-C."""

    def read(self, size: int | None = -1) -> str:
        raise KeyboardInterrupt


def test_a_command_without_checkpoints_does_not_promise_to_resume(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", Interrupted())
    assert main(["credit", "--model", "anything", "--text", "-", "--json"]) == 130
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "apportion: interrupted; `apportion credit` writes no checkpoints: the same command starts over.\n"


@pytest.mark.parametrize("name", COMMANDS)
def test_what_each_command_says_is_so(name: str) -> None:
    """A command has checkpoints where its settings say how often; the demo and a chain run such commands."""
    has = "checkpoint_every" in SETTINGS[name].model_fields if name in SETTINGS else name in ("demo", "run")
    assert (name in CHECKPOINTED) == has
    text = after_interrupt(name)
    assert ("resumes from the last checkpoint, or starts over where there is none yet" in text) == has
    by_rows = "the same command resumes after the last row that was written" in text
    by_parts = "resumes after what was finished" in text
    assert ("no checkpoints: the same command starts over" in text) != (has or by_rows or by_parts)
    assert by_parts == (name == "evaluate")
    assert by_rows == (name == "sample")


@dataclass
class Settings:
    """Settings of a benchmark that is interrupted."""

    batches: int = 3


def test_a_benchmark_has_none_either(capsys: pytest.CaptureFixture[str]) -> None:
    def action(config: Settings, as_json: bool) -> int:
        assert as_json and config.batches == 4
        raise KeyboardInterrupt

    assert run_command("speed", Settings, lambda config: None, action, "", ["--json", "--batches", "4"]) == 130
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "benchmarks.speed: interrupted; it writes no checkpoints: the same command starts over.\n"
