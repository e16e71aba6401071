"""A few inputs of `benchmarks.fuzz`, and every input on which it found a fault."""

from __future__ import annotations

import json
from pathlib import Path

import fuzzing
import pytest
from benchmarks import fuzz
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scripts import run_benchmark


@pytest.mark.parametrize("target", fuzzing.TARGETS)
@settings(suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_only_apportion_errors_are_raised(target: str, data: st.DataObject) -> None:
    fuzzing.TARGETS[target](data)


@pytest.mark.parametrize(
    ("suffix", "content"),
    [
        (".csv", b"\xef\xbb\xbf"),  # a byte-order mark and nothing else
        (".jsonl", b'{"text": ' + b"9" * 5000 + b"}"),  # more digits than Python reads
        (".jsonl", b"[" * 100_000),
        (".json", b"[" + b"[" * 200 + b"]" * 200 + b"]"),
        (".csv", b"text\n\xff\n"),
        (".csv", b'text\n"\r'),
    ],
)
def test_tables_of_former_faults(suffix: str, content: bytes) -> None:
    fuzzing.check_table(suffix, content)


@pytest.mark.parametrize(
    ("stage", "text", "flags"),
    [
        ("rl", None, [("policy", "1e-4")]),  # a text that reads back as a number unless it is quoted
        ("rl", None, [("policy", "\ud800")]),  # a lone surrogate, as bytes that are no UTF-8 become on the command line
        ("rl", "credit: &a [*a]\n", []),
        ("rl", "steps: !!timestamp x\n", []),
        ("rl", None, [("credit", "!!bool perhaps")]),
        ("reward", "<<: {excerpts: 3}\n", []),
        ("rl", "credit: {class_path: os.getcwd}\n", []),
    ],
)
def test_settings_of_former_faults(stage: str, text: str | None, flags: list[tuple[str, str]]) -> None:
    fuzzing.check_settings(stage, text, flags)


def test_the_benchmark_counts_examples_and_reports_failures(monkeypatch: pytest.MonkeyPatch) -> None:
    result = fuzz.fuzz("offsets", 0.001, 7)
    assert result["examples"] > 0 and result["failure"] is None and result["cpu_minutes"] < 1

    def fragile(data: st.DataObject) -> None:
        assert data.draw(st.integers()) < 1000

    monkeypatch.setitem(fuzz.TARGETS, "readers", fragile)
    result = fuzz.fuzz("readers", 1, 7)
    assert "AssertionError" in result["failure"] and "1000" in result["failure"] and result["failing_seed"] >= 7


@pytest.mark.long
def test_the_command(tmp_path: Path) -> None:
    done = run_benchmark("fuzz", "--target", "readers", "--minutes", 0.2, folder=tmp_path)
    assert done.code == 0, done.err
    assert json.loads(done.out)["examples"] > 100
