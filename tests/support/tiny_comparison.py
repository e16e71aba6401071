"""Tiny comparisons of policies: what they read on disk, and the flags of `apportion evaluate`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tiny
import tiny_runs

from apportion.cli.main import main

COUNT, TEMPERATURE = 8, 0.8
SETTINGS: dict[str, Any] = {
    "sampling.max_new_tokens": 6,
    "sampling.temperature": TEMPERATURE,
    "sampling.batch_size": 4,
    "dtype": "float32",
    "device": "cpu",
    "bootstrap": 50,
    "heat_maps": 3,
}


def world(folder: Path) -> Path:
    """Write a `tiny_runs.world` with a finished rl run (ppo), another policy and held-out prompts to `folder`."""
    tiny_runs.world(folder)
    rows = [{"prompt": f"{tiny.TEXTS[i % 4][: 10 + i]} {i}", "topic": "ab"[i % 2]} for i in range(COUNT)]
    (folder / "held.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tiny.save_policy(folder / "other", seed=5)
    common: dict[str, Any] = {"policy": folder / "ending", "sampling.stop": "eos", "steps": 4, "optim.lr": 0.02}
    assert main(["rl", *tiny_runs.flags(folder, folder / "ppo", **common)]) == 0
    return folder


def flags(world: Path, output: Path, policies: list[Path], *more: str, **changes: Any) -> list[str]:
    """Return the flags of a comparison of `policies` in a `world`; `changes` go by dotted names."""
    given = SETTINGS | {"prompts": world / "held.jsonl", "output": output} | changes
    words = [str(word) for name, value in given.items() for word in (f"--{name}", value)]
    return ["--policies", *map(str, policies), *words, *more]


JUDGES = ("--judges", "judges:vowels", "judges:of_topic", "--against", "all", "--bucket", "topic")


def figures(run: Path) -> dict[str, Any]:
    """Return evaluation.json of a comparison."""
    found: dict[str, Any] = json.loads((run / "evaluation.json").read_text())
    return found
