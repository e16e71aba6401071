"""Settings of `benchmarks.faults` and `benchmarks.soak`; standard library only."""

from __future__ import annotations

from dataclasses import dataclass

from apportion.errors import ConfigError


@dataclass
class FaultsConfig:
    """Runs are killed (SIGKILL), resumed, and compared with undisturbed ones.

    Attributes:
        kills: number of kills, half of them with adapters and half with all weights trained.
        model_kills: number of them on the whole built-in model instead of a 2-layer one.
        in_checkpoint: fraction of the kills aimed at the writing of a checkpoint; the others come at any time.
        tokenizer: `smollm2`, or a folder with a tokenizer (then model_kills must be 0).
        steps: batches of a run.
        checkpoint_every: batches between checkpoints.
        jobs: runs in parallel, with one thread each.
        seed: of the moments of the kills.
        folder: folder of the runs; null is a temporary folder, removed at the end.
        out: the result file; null writes none.
    """

    kills: int = 50
    model_kills: int = 3
    in_checkpoint: float = 0.3
    tokenizer: str = "smollm2"
    steps: int = 60
    checkpoint_every: int = 3
    jobs: int = 2
    seed: int = 0
    folder: str | None = None
    out: str | None = None


@dataclass
class SoakConfig:
    """One long run of a small model, whose memory and file handles must not grow.

    Attributes:
        batches: number of batches.
        judge_after: batches before memory is judged.
        tokenizer: `smollm2`, or a folder with a tokenizer.
        seed: of the run.
        folder: folder of the run; null is a temporary folder, removed at the end.
        out: the result file; null writes none.
    """

    batches: int = 2000
    judge_after: int = 200
    tokenizer: str = "smollm2"
    seed: int = 0
    folder: str | None = None
    out: str | None = None


def check_faults(config: FaultsConfig) -> None:
    """Raise ConfigError for a setting outside its range."""
    minima = {"kills": (config.kills, 1), "model_kills": (config.model_kills, 0), "jobs": (config.jobs, 1)}
    minima |= {"steps": (config.steps, 3), "checkpoint_every": (config.checkpoint_every, 1)}
    for name, (value, low) in minima.items():
        if type(value) is not int or value < low:
            raise ConfigError(name, value, f"a whole number >= {low}", f"Set {name} to one.")
    if not 0 <= config.in_checkpoint <= 1:
        fix = "0 aims at none, 1 at all."
        raise ConfigError("in_checkpoint", config.in_checkpoint, "a number in [0, 1]", fix)
    if config.model_kills > config.kills:
        raise ConfigError("model_kills", config.model_kills, f"at most kills ({config.kills})", "Lower it.")
    if config.model_kills and config.tokenizer != "smollm2":
        fix = "The whole model has its own tokenizer: set model_kills to 0."
        raise ConfigError("tokenizer", config.tokenizer, "smollm2 where model_kills > 0", fix)
    if config.checkpoint_every >= config.steps:
        expected = f"less than steps ({config.steps})"
        fix = "Without a checkpoint there is nothing to resume."
        raise ConfigError("checkpoint_every", config.checkpoint_every, expected, fix)


def check_soak(config: SoakConfig) -> None:
    """Raise ConfigError for a setting outside its range."""
    if config.judge_after < 1:
        raise ConfigError("judge_after", config.judge_after, "a whole number >= 1", "Set it to one.")
    if config.batches < 2 * config.judge_after:
        expected = f"at least twice judge_after ({config.judge_after})"
        raise ConfigError("batches", config.batches, expected, "Growth is judged after the warm-up.")
