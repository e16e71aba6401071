"""Settings of `apportion dpo`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from apportion.config.schema.rules import Name, Positive
from apportion.config.schema.section import Rule
from apportion.config.trainer import AdamWConfig, TrainerConfig

Smoothing = Annotated[float, Field(ge=0, lt=0.5, strict=True), Rule("a number in [0, 0.5)")]
PairsName = Annotated[
    str,
    Field(strict=True, pattern=r"\S"),
    Rule(
        "a file, folder or hub id of preference pairs or rankings",
        'Write rows such as {"prompt": "...", "chosen": "...", "rejected": "..."} and pass --data pairs.jsonl.',
    ),
]


class DPOConfig(TrainerConfig):
    """`apportion dpo`: train a policy on preference pairs or rankings by direct preference optimisation, with TRL."""

    data: PairsName = ""
    """preference pairs (chosen, rejected, with or without prompt) or rankings (prompt, completions, ranks): a file
    (JSON, Parquet, Arrow, CSV, TSV), a folder, or a hub id."""
    output: Name = "runs/dpo"
    """run folder."""
    ranking_pairs: Literal["all", "best_worst"] = "all"
    """of a ranking: all its pairs, or only its best against its worst completion."""
    loss: Literal["sigmoid", "ipo"] = "sigmoid"
    """"sigmoid" (DPO), or "ipo" (a squared distance, of log-probabilities a token)."""
    beta: Positive = 0.1
    """how strongly the policy is held to the reference; of IPO its τ."""
    label_smoothing: Smoothing = 0.0
    """probability that a pair is labelled the wrong way round; not with ipo."""
    optim: AdamWConfig = Field(default_factory=lambda: AdamWConfig(lr=1e-5))
