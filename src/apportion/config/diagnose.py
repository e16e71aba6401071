"""Settings of `apportion diagnose`."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from apportion.config.schema.rules import (
    AtLeastTwo,
    Count,
    Device,
    Dtype,
    Fraction,
    Label,
    Methods,
    Name,
    RewardModelName,
    Seed,
    Switch,
    Word,
)
from apportion.config.schema.section import Rule, Section
from apportion.config.sections import SamplingConfig

Prompts = Annotated[
    int, Field(ge=2, strict=True), Rule("a whole number >= 2: intervals are taken over prompts", "Set it to 64, say.")
]
Width = Annotated[int, Field(ge=8, strict=True), Rule("a whole number >= 8")]


class DiagnoseConfig(Section):
    """`apportion diagnose`: which credit suits this policy and this reward model, before any training."""

    policy: Name = "smollm2"
    """the current policy: `smollm2`, a folder, or a hub id."""
    reward_model: RewardModelName = ""
    """any sequence classifier with 1 or 2 labels: a folder or a hub id."""
    prompts: Name = "imdb"
    """`imdb`, a file or folder with a column prompt, messages or text (or chosen and rejected), or a hub id."""
    split: Name | None = None
    """the split of `prompts` to read, of a folder or hub set with splits; null for train."""
    skip_bad_rows: Switch = False
    """skip unusable rows, count them and write them to bad_rows.jsonl; off, the first of them is an error."""
    output: Name = "runs/diagnose"
    """run folder."""
    methods: Methods = Field(default_factory=lambda: ["sparse", "uniform", "attention", "prefix_difference"])
    """credits (a name or {name: {key: value}}) and named algorithms to compare."""
    count: Prompts = 128
    """prompts, the units over which intervals are taken."""
    samples: AtLeastTwo = 32
    """rollouts of each prompt; their mean is the baseline."""
    batch: AtLeastTwo = 32
    """rollouts of the batch that the signal-to-noise ratio is stated for."""
    lam: Fraction = 1.0
    """λ of the credits' reward-to-go; 1 judges the credit by itself. A named algorithm keeps its own estimator."""
    width: Width = 768
    """gradients are taken by the last states; wider ones are projected to this many dimensions."""
    pad_token: Word | None = None
    """a token to pad with, added to the policy's vocabulary where it is new; null is its own, or EOS."""
    positive_label: Label | None = None
    """name or number of the reward model's label whose logit raises the score, where names do not say which is good."""
    seed: Seed = 0
    """random seed."""
    device: Device = "auto"
    """where the models compute."""
    threads: Count | None = None
    """processor threads of torch; null takes OMP_NUM_THREADS where it is set, else the cores that are free."""
    dtype: Dtype = "auto"
    """the policy's: auto (bfloat16 where the processor has it), float32, bfloat16."""
    reward_dtype: Dtype = "auto"
    """the reward model's."""
    sampling: SamplingConfig = Field(default_factory=lambda: SamplingConfig(batch_size=128))
