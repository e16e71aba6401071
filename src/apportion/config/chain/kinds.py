"""The stages that a recipe can have: their settings, what each reads, and what it gives to those after it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from apportion.config import (
    DPOConfig,
    EvaluateConfig,
    LabelConfig,
    RewardConfig,
    RLConfig,
    SampleConfig,
    SFTConfig,
)
from apportion.config.chain.split import SplitConfig
from apportion.config.schema.section import Section


class Kind(NamedTuple):
    """One kind of stage.

    Attributes:
        settings: their class. inputs: the settings that name a model or data.
        outputs: {name: file or folder in the run folder}, where {…} stands for a setting.
        words: what it does, for the help.
    """

    settings: type[Section]
    inputs: tuple[str, ...]
    outputs: Mapping[str, str]
    words: str


DATABASE = "labels.db"
MODEL = {"model": "final"}
SPLIT = ("rankings", "demonstrations", "prompts", "held_out_rankings", "held_out_prompts")
KINDS: Mapping[str, Kind] = {
    "split": Kind(
        SplitConfig, ("data",), {name: f"{name}.jsonl" for name in SPLIT}, "people's rankings, split by prompt"
    ),
    "sft": Kind(SFTConfig, ("model", "data", "test_data"), MODEL, "fine-tuning on demonstrations"),
    "sample": Kind(SampleConfig, ("policy", "prompts"), {"samples": "samples.{format}"}, "K answers to every prompt"),
    "label": Kind(
        LabelConfig,
        ("data", "guidelines"),
        {"rankings": "rankings.jsonl"},
        "people rank answers on a page; it waits until all are ranked",
    ),
    "reward": Kind(RewardConfig, ("model", "data", "test_data", "preferences.demonstrations"), MODEL, "a reward model"),
    "rl": Kind(
        RLConfig,
        ("policy", "reward_model", "rewards", "prompts", "ppo.ptx_data", "keep_best.prompts"),
        {**MODEL, "best": "best"},
        "PPO, GRPO and others, with the reward apportioned over tokens",
    ),
    "dpo": Kind(DPOConfig, ("model", "data", "test_data"), MODEL, "direct preference optimisation"),
    "evaluate": Kind(
        EvaluateConfig,
        ("policies", "start", "rewards", "judges", "prompts"),
        {"figures": "evaluation.json"},
        "policies on held-out prompts",
    ),
}
OUTPUT = "output"  # the run folder itself; every kind has it


def outputs_of(kind: str) -> list[str]:
    """Return the names of what a stage of this kind gives to others."""
    return [*KINDS[kind].outputs, OUTPUT]
