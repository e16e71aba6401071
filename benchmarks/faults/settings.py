"""The settings of `apportion bench faults` and `apportion bench soak`."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from apportion.config.rules import Count, CountOrZero, Fraction, Name, Seed, Word
from apportion.config.section import Rule, Section
from apportion.errors import ConfigError

Steps = Annotated[int, Field(ge=3, strict=True), Rule("a whole number >= 3")]


class FaultsConfig(Section):
    """`apportion bench faults`: runs are killed (SIGKILL), go on, and are compared with ones that were left alone."""

    kills: Count = 50
    """how many, half of them with adapters and half with all weights learning."""
    model_kills: CountOrZero = 3
    """of these, how many on the whole built-in model instead of a 2-layer one."""
    in_checkpoint: Fraction = 0.3
    """part of the kills that is aimed at the writing of a checkpoint; the others come at any time."""
    tokenizer: Name = "smollm2"
    """`smollm2`, or a folder with a tokenizer (then model_kills must be 0)."""
    steps: Steps = 60
    """batches of a run."""
    checkpoint_every: Count = 3
    """batches between checkpoints."""
    jobs: Count = 2
    """runs at a time, with one thread each."""
    seed: Seed = 0
    """of the moments."""
    folder: Word | None = None
    """where the runs are written; null is a temporary folder, removed at the end."""
    out: Word | None = None
    """the result file; null writes none."""


class SoakConfig(Section):
    """`apportion bench soak`: one long run of a small model, whose memory and file handles may not grow."""

    batches: Count = 2000
    """how many."""
    judge_after: Count = 200
    """batches before memory is judged."""
    tokenizer: Name = "smollm2"
    """`smollm2`, or a folder with a tokenizer."""
    seed: Seed = 0
    """of the run."""
    folder: Word | None = None
    """where it is written; null is a temporary folder, removed at the end."""
    out: Word | None = None
    """the result file; null writes none."""


def check_faults(config: FaultsConfig) -> None:
    """Raise ConfigError for a combination of settings that cannot work."""
    if config.model_kills > config.kills:
        raise ConfigError("model_kills", config.model_kills, f"at most kills ({config.kills})", "Lower it.")
    if config.model_kills and config.tokenizer != "smollm2":
        fix = "The whole model reads its own tokenizer: set model_kills to 0."
        raise ConfigError("tokenizer", config.tokenizer, "smollm2 where model_kills > 0", fix)
    if config.checkpoint_every >= config.steps:
        expected = f"less than steps ({config.steps})"
        fix = "Without a checkpoint there is nothing to go on from."
        raise ConfigError("checkpoint_every", config.checkpoint_every, expected, fix)


def check_soak(config: SoakConfig) -> None:
    """Raise ConfigError for a combination of settings that cannot work."""
    if config.batches < 2 * config.judge_after:
        expected = f"at least twice judge_after ({config.judge_after})"
        raise ConfigError("batches", config.batches, expected, "Growth is judged after the warm-up.")
