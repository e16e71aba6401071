"""A tiny world for recipes: a base model, rankings by a hidden rule, and a chain of small stages on them."""

from __future__ import annotations

import json
from pathlib import Path

import trainer_runs

WORDS = ("great", "fine", "dull", "stupid")  # the best first
SMALL = "max_length: 64, dtype: float32, device: cpu, checkpoint_every: 0"
CHAIN = """
description: a tiny chain
expect: {{result: nothing to speak of, minutes: 1, machine: one core}}
output: {output}
vars: {{rankings: null, base: {base}, steps: 2}}
stages:
  split: {{data: "${{rankings}}", held_out: 6, seed: 1}}
  sft: {{model: "${{base}}", data: "${{split.demonstrations}}", steps: 2, batch_size: 4, lora.rank: 4, {small}}}
  reward:
    model: ${{sft.model}}
    data: ${{split.rankings}}
    probe_excerpts: 0
    batch_size: 8
    lora.rank: 4
    dtype: float32
    device: cpu
    checkpoint_every: 1
  ppo:
    stage: rl
    policy: ${{sft.model}}
    reward_model: ${{reward.model}}
    prompts: ${{split.prompts}}
    steps: ${{steps}}
    sampling: {{batch_size: 4, max_new_tokens: 4, prompt_tokens: null}}
    ppo: {{epochs: 1, mini_batch: 4}}
    lora.rank: 4
    compare: [sparse]
    dtype: float32
    device: cpu
    checkpoint_every: 0
  dpo: {{model: "${{sft.model}}", data: "${{split.rankings}}", steps: 2, batch_size: 4, lora.rank: 4, {small}}}
"""


def rankings(path: Path, count: int = 40) -> Path:
    """Write rankings of two to four answers in a shuffled order, the friendlier word first."""
    rows = []
    for i in range(count):
        order = sorted(range(2 + i % 3), key=lambda j: (7 * j + i) % 5)
        completions = [f" a {WORDS[j]} story." for j in order]
        rows.append({"prompt": f"Film {i} was", "completions": completions, "ranks": [j + 1 for j in order]})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def world(folder: Path) -> Path:
    """Write the base model, the rankings and recipe.yaml to `folder`; return it."""
    trainer_runs.save_model(folder / "base")
    rankings(folder / "rankings.jsonl")
    write_recipe(folder, CHAIN)
    return folder


def write_recipe(folder: Path, text: str, name: str = "recipe.yaml") -> Path:
    """Write a recipe whose paths are those of `folder`."""
    path = folder / name
    path.write_text(text.format(output=folder / "chain", base=folder / "base", small=SMALL), encoding="utf-8")
    return path
