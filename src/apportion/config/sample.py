"""Settings of `apportion sample`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from apportion.config.schema.rules import Count, Device, Dtype, Interval, Name, NotNegative, Seed, Switch, Word
from apportion.config.schema.section import Rule, Section
from apportion.config.sections import SamplingConfig

Share = Annotated[float, Field(gt=0, le=1, strict=True), Rule("a number in (0, 1]")]


class AnswerSampling(SamplingConfig):
    """How answers are generated. Training needs plain sampling; answers for people may leave unlikely tokens out."""

    batch_size: Count = 32
    """answers generated together, those of one prompt always: speed and memory, and how often rows are written."""
    samples_per_prompt: Count = 4
    """answers to one prompt."""
    max_new_tokens: Count = 128
    """longest answer, tokens."""
    stop: Literal["length", "eos"] = "eos"
    """"eos" ends at EOS, and at every id that the policy's generation settings list; "length" generates exactly
    max_new_tokens."""
    prompt_tokens: Interval | None = None
    """keep the first n tokens of each prompt, n drawn evenly from [low, high]; null keeps it all."""
    top_k: Count | None = None
    """draw from the k most likely tokens; null from all."""
    top_p: Share | None = None
    """draw from the fewest most likely tokens whose probabilities sum to p; null from all."""
    min_p: Share | None = None
    """draw from tokens at least min_p times as likely as the most likely one; null from all."""


class SampleConfig(Section):
    """`apportion sample`: K answers to every prompt, with their log-probabilities."""

    policy: Name = "smollm2"
    """`smollm2`, a folder, or a hub id of a causal language model."""
    prompts: Name = "imdb"
    """`imdb`, a file or folder with prompts, conversations or texts, or a hub id."""
    split: Name | None = None
    """the split of `prompts` to read, of a folder or hub set with splits; null for train."""
    count: Count | None = None
    """the first so many prompts; null for all."""
    skip_bad_rows: Switch = False
    """skip unusable rows, count them and write them to bad_rows.jsonl; off, the first of them is an error."""
    output: Name = "runs/sample"
    """run folder; the answers are in its samples.jsonl or samples.parquet."""
    format: Literal["jsonl", "parquet"] = "jsonl"
    """of the finished file; until then rows are in samples.jsonl."""
    pad_token: Word | None = None
    """a token of the vocabulary to pad with; null is the tokenizer's own, or EOS where it has none."""
    seed: Seed = 0
    """random seed; a prompt's answers depend on it and on the prompt's place, not on the batch."""
    device: Device = "auto"
    """where the model computes."""
    threads: Count | None = None
    """processor threads of torch; null takes OMP_NUM_THREADS where it is set, else the cores that are free."""
    dtype: Dtype = "auto"
    """auto (bfloat16 where the processor has it), float32, bfloat16."""
    fast_kernels: Switch = True
    """faster layers, equal up to rounding; off, every layer is that of transformers."""
    disk_wait: NotNegative = 300.0
    """seconds to wait for space on a full disk before the run ends; 0 ends it at once."""
    sampling: AnswerSampling = Field(default_factory=AnswerSampling)
