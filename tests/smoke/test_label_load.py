"""The benchmark of many annotators: its counts on a few of them, never a time."""

from __future__ import annotations

import json
from pathlib import Path

from commands import run_python

ROOT = Path(__file__).parents[2]


def test_nothing_is_lost_or_doubled_with_a_few_annotators() -> None:
    words = ("--annotators", 6, "--seconds", 8, "--databases", "sqlite", "--json")
    found = json.loads(run_python("-m", "benchmarks.label_load", *words, cwd=ROOT).out)["sqlite"]
    assert found["rankings"] >= 6
    assert [found[name] for name in ("failed", "lost", "doubled", "over_ranked")] == [0, 0, 0, 0]
    assert found["requests"] > found["rankings"]
