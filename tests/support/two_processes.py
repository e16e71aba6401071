"""Launchers of two processes, and the comparison of their run with that of one process.

A launcher and its two processes import torch and more, 15 seconds of a core: where a test is not about the launcher,
two forked processes get the variables that it sets (`commands.Server.pair`).
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import Server

REPO = Path(__file__).parents[2]
SUPPORT = Path(__file__).parent
ACCELERATE = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--main_process_port", "0"]
MACHINE = ("time/", "memory/")  # metrics that say how fast and how large, not what


def launch(words: list[Any], **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command with src and tests/support on the import path, and without the settings of an outer launcher."""
    paths = os.pathsep.join([str(REPO / "src"), str(SUPPORT)])
    plain = {k: v for k, v in os.environ.items() if not k.startswith(("ACCELERATE_", "FSDP_", "MASTER_"))}
    settings = plain | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | environment
    return subprocess.run([str(w) for w in words], capture_output=True, text=True, env=settings, timeout=240)


def run_pair(heavy: Server, name: str, *arguments: Any, folder: Path, **environment: str) -> None:
    """Run the program `name` of tests/support in two processes, which both have to succeed."""
    words = [SUPPORT / name, *arguments]
    both = heavy.pair(*words, cwd=folder, program="file", PYTHONPATH=str(SUPPORT), **environment)
    assert [done.code for done in both] == [0, 0], [done.err for done in both]


def differences(one: dict[str, Any], two: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Return what differs by more than float32 rounding between the trace of one process and those of two."""
    if two["ids"] != one["ids"]:
        return ["other tokens were sampled"]
    if not len(two["gradients"]) == len(one["gradients"]) > 2 or len(two["metrics"]) != len(one["metrics"]):
        return ["the number of steps"]
    result: list[str] = []
    # the first step starts from the same weights; under Adam their rounding errors grow from there
    apart = [float((a - b).norm() / a.norm()) for a, b in zip(one["gradients"], two["gradients"], strict=True)]
    if not (apart[0] < 1e-5 and max(apart) < 1e-3):
        result.append(f"gradients: {apart}")
    for step, (mine, theirs) in enumerate(zip(one["metrics"], two["metrics"], strict=True)):
        rounding = 1e-5 if step else 2e-6
        if mine.keys() != theirs.keys():
            result.append(f"names of metrics at step {step}: {sorted(mine.keys() ^ theirs.keys())}")
        rounding = 1e-5 if step else 2e-6  # a KL is a mean of differences, near zero, of weights that have moved
        for name in mine.keys() & theirs.keys():
            if theirs[name] != pytest.approx(mine[name], rel=1e-4, abs=rounding):
                result.append(f"{name} at step {step}: {mine[name]} and {theirs[name]}")
    if one["state"].keys() != two["state"].keys():
        result.append("names of states")
    for name in one["state"].keys() & two["state"].keys():
        if not torch.allclose(two["state"][name], one["state"][name], rtol=1e-6, atol=0):
            result.append(f"state {name}")
    # the two processes stay bitwise equal
    pairs = [(two["weights"], other["weights"]), *zip(two["gradients"], other["gradients"], strict=True)]
    if two["metrics"] != other["metrics"] or not all(torch.equal(a, b) for a, b in pairs):
        result.append("the two processes from each other")
    return result
