"""Settings that the stages on TRL's trainers share: data, batches, lengths, the optimizer."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from apportion.config.schema.rules import (
    AtLeastTwo,
    Count,
    CountOrZero,
    Device,
    Dtype,
    Fraction,
    Name,
    NotNegative,
    Positive,
    RepositoryName,
    Seed,
    Switch,
    Trackers,
    Variables,
    Word,
)
from apportion.config.schema.section import Section
from apportion.config.sections import LoraConfig


class AdamWConfig(Section):
    """AdamW and its schedule."""

    lr: Positive = 2e-4
    """peak learning rate; all weights (lora.rank 0) want about a tenth of what adapters do."""
    warmup: Fraction = 0.05
    """fraction of the steps over which it rises from 0."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """then it falls to 0 in a line, in half a cosine, or stays."""
    eps: Positive = 1e-8
    """Adam's epsilon."""
    weight_decay: NotNegative = 0.0
    """decoupled weight decay."""
    max_grad_norm: Positive = 1.0
    """clip the gradient's norm to this."""


class TrainerConfig(Section):
    """Settings of a stage on one of TRL's trainers."""

    model: Name = "smollm2"
    """start: `smollm2`, a folder, or a hub id."""
    data: Name = "imdb"
    """rows to train on: a file (CSV, TSV, JSON, Parquet, Arrow), a folder, or a hub id."""
    test_data: Word | None = None
    """held-out rows of the same form; null holds out a part of `data` by hash (`held_out`)."""
    split: Name | None = None
    """the split of `data` to read, of a folder or hub set with splits; null for train."""
    test_split: Name | None = None
    """the split of `test_data` to read; null for train."""
    held_out: Fraction = 0.05
    """share of the prompts of `data` that is held out, without `test_data`; 0 trains on all and evaluates nothing."""
    test_rows: Count = 200
    """most held-out rows to evaluate on."""
    prompt_column: Name | None = None
    """column with the prompt; null takes prompt, where there is one."""
    skip_bad_rows: Switch = False
    """skip unusable rows, count them and write them to bad_rows.jsonl; off, the first of them is an error."""
    chat_template_kwargs: Variables | None = None
    """variables of the model's chat template, such as {enable_thinking: false}; a row's own win over them."""
    output: Name = "runs/trainer"
    """run folder."""
    epochs: Count = 1
    """passes over the rows."""
    steps: Count | None = None
    """optimizer steps, in place of epochs; null for whole epochs."""
    batch_size: Count = 16
    """rows an optimizer step."""
    micro_batch: Count = 4
    """most rows a forward and backward pass (memory only); the largest divisor of batch_size up to it is used."""
    max_length: AtLeastTwo = 1024
    """longest row, tokens of prompt and answer together."""
    overlong: Literal["drop", "truncate"] = "drop"
    """what becomes of longer rows: "drop" leaves them out, "truncate" cuts their ends; both are counted."""
    gradient_checkpointing: Switch = False
    """compute activations again in the backward pass: less memory, more time."""
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
    pad_token: Word | None = None
    """a token to pad with, added to the vocabulary where it is new; null is the tokenizer's own, or EOS."""
    seed: Seed = 0
    """random seed."""
    device: Device = "auto"
    """where the model computes."""
    threads: Count | None = None
    """processor threads of torch; null takes OMP_NUM_THREADS where it is set, else the cores that are free."""
    dtype: Dtype = "auto"
    """auto (bfloat16 where the processor has it), float32, bfloat16: of a base under adapters its weights, of a model
    whose weights all learn its products, over float32 weights."""
    fast_kernels: Switch = False
    """faster layers, equal up to rounding; off, every layer is that of transformers and peft, and the weights are bit
    for bit those of TRL's own trainer."""
    lora: LoraConfig = Field(default_factory=LoraConfig)
    optim: AdamWConfig = Field(default_factory=AdamWConfig)
