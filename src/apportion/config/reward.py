"""Settings of `apportion reward`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from apportion.config.schema.rules import (
    Count,
    CountOrZero,
    Device,
    Dtype,
    Interval,
    Name,
    NotNegative,
    RepositoryName,
    Seed,
    Switch,
    Trackers,
    Word,
)
from apportion.config.schema.section import Section
from apportion.config.sections import LoraConfig, OptimConfig


class PreferenceConfig(Section):
    """Learning from rankings of K completions, whole, by a head of one label: R is its logit."""

    whole: Switch = False
    """read preference pairs as rankings of two whole answers, instead of excerpts; rankings are always whole."""
    loss: Literal["bradley_terry", "plackett_luce"] = "bradley_terry"
    """all pairs of a ranking, or the likelihood of its whole order."""
    ties: Literal["skip", "half"] = "skip"
    """two equal ranks are no pair, or one that is half won by either."""
    weight: Literal["prompt", "pair"] = "prompt"
    """every ranking counts 1, or every pair."""
    margins: Switch = True
    """use the margins that rows have."""
    epochs: Count = 1
    """passes over the rankings; more overfit soon."""
    max_tokens: Count = 512
    """longest answer, tokens; a longer one is cut, and counted."""
    center_coef: NotNegative = 0.0
    """weight of a penalty on (2·mean R of a prompt)², which holds rewards near 0 in training; 0.01 is usual."""
    zero_mean: Switch = True
    """subtract the mean reward after training, over the completions of `data`."""
    demonstrations: Word | None = None
    """take that mean over these texts instead: text, messages, or prompt and completion."""


class RewardConfig(Section):
    """`apportion reward`: train a reward model on labelled texts, preference pairs or rankings of K completions."""

    model: Name = "smollm2"
    """start: `smollm2`, a folder, or a hub id."""
    data: Name = "imdb"
    """`imdb`, a file (CSV, TSV, JSON, Parquet, Arrow) or folder of labelled texts, preference pairs or rankings, or a
    hub id."""
    test_data: Word | None = None
    """held-out data of the same form; null holds out a fixed part of `data` by hash."""
    split: Name | None = None
    """the split of `data` to read, of a folder or hub set with splits; null for train."""
    test_split: Name | None = None
    """the split of `test_data` to read; null for train."""
    text_column: Name | None = None
    """column with the text or the conversation to judge; null takes text, messages, or completion behind prompt."""
    prompt_column: Name | None = None
    """column with what that text responds to; null takes prompt where the text is in completion, else none."""
    label_column: Name | None = None
    """column with the label, 1 or 0, true or false, positive or negative; null takes label."""
    skip_bad_rows: Switch = False
    """skip unusable rows, count them and write them to bad_rows.jsonl; off, the first of them is an error."""
    output: Name = "runs/reward"
    """run folder."""
    excerpts: Count = 10000
    """training excerpts, each cut at random from a text; of preference pairs, pairs of them; not of rankings."""
    excerpt_tokens: Interval = Field(default_factory=lambda: [8, 64])
    """shortest and longest excerpt, tokens, behind a prompt or what the texts of a pair share; not of rankings."""
    probe_excerpts: CountOrZero = 2000
    """excerpts, or ranked completions, to fit the head on by logistic regression before training; 0 starts from a
    random head."""
    batch_size: Count = 16
    """excerpts, pairs of them, or prompts with all their ranked completions, an optimizer step."""
    micro_batch: Count = 16
    """excerpts a forward and backward pass (memory only; it does not change the result); a prompt's ranked completions
    stay together."""
    test_texts: Count = 1000
    """held-out texts, pairs or rankings to evaluate on."""
    checkpoint_every: CountOrZero = 100
    """steps between checkpoints; 0 for none."""
    keep_checkpoints: Count = 2
    """number of newest checkpoints to keep."""
    disk_wait: NotNegative = 300.0
    """seconds to wait for space on a full disk before the run ends; 0 ends it at once."""
    trackers: Trackers = Field(default_factory=list)
    """where to log every metric too: tensorboard, wandb, trackio, one or several; empty for nowhere."""
    tracker_project: Name = "apportion"
    """the project of wandb and trackio."""
    push_to_hub: RepositoryName | None = None
    """upload the final model to this repository of the hub, with the token of HF_TOKEN or `hf auth login`."""
    hub_private: Switch = True
    """make that repository private, where it does not exist yet."""
    license: Name | None = None
    """licence of the final model, for its card, such as apache-2.0; null says that none was given."""
    max_skipped: Count = 3
    """consecutive updates with a non-finite loss or gradient before the run stops; each one is skipped."""
    pad_token: Word | None = None
    """a token of the vocabulary to pad with; null is the tokenizer's own, or EOS where it has none."""
    seed: Seed = 0
    """random seed."""
    device: Device = "auto"
    """where the model computes."""
    threads: Count | None = None
    """processor threads of torch; null takes OMP_NUM_THREADS where it is set, else the cores that are free."""
    dtype: Dtype = "auto"
    """auto (bfloat16 where the processor has it), float32, bfloat16."""
    fast_kernels: Switch = True
    """faster layers, equal up to rounding; off, every layer is that of transformers and peft."""
    lora: LoraConfig = Field(default_factory=LoraConfig)
    optim: OptimConfig = Field(default_factory=lambda: OptimConfig(lr=1e-3))
    preferences: PreferenceConfig = Field(default_factory=PreferenceConfig)
