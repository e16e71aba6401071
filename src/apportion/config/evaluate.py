"""Settings of `apportion evaluate`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from apportion.config.sample import AnswerSampling
from apportion.config.schema.rules import (
    Count,
    CountOrZero,
    Device,
    Dtype,
    Label,
    Name,
    NotNegative,
    Rewards,
    Seconds,
    Seed,
    Switch,
    Word,
    listed,
)
from apportion.config.schema.section import Rule, Section, to_dict
from apportion.errors import ConfigError

Policies = Annotated[
    list[Name],
    BeforeValidator(listed),
    Field(min_length=1),
    Rule("run folders, models or files of answers", "Example: --policies runs/rl runs/dpo."),
]


class EvaluationSampling(AnswerSampling):
    """How every policy answers, the start too. Each prompt has its own random numbers, the same for all policies."""

    samples_per_prompt: Count = 1
    """answers to one prompt; all pairs of two policies' answers to it are compared."""


class EvaluateConfig(Section):
    """`apportion evaluate`: policies on the same prompts, by rewards and judges, against their start or each other."""

    run: Name = "runs/rl"
    """without `policies`: the folder of a finished `apportion rl` run, compared with its start by its own rewards."""
    policies: Policies | None = None
    """what is compared: folders of finished sft, dpo or rl runs, model folders, hub ids, or files of given answers."""
    start: Name | None = None
    """what win rates and KL are measured against: as one of `policies`; null for the recorded start of the first."""
    checkpoint: Literal["final", "best"] = "final"
    """of rl runs: the last policy, or the one that keep_best kept."""
    prompts: Name = "imdb"
    """`imdb` (reviews that no stage was trained on), a file or folder, or a hub id."""
    split: Name | None = None
    """the split of `prompts` to read, of a folder or hub set with splits; null for train."""
    skip_bad_rows: Switch = False
    """skip unusable rows, count them and write them to evaluate_bad_rows.jsonl; off, the first is an error."""
    count: Count = 128
    """prompts to sample on, the first ones."""
    rewards: Rewards | None = None
    """held-out rewards and their weights, as `apportion rl --rewards`; null for those of the first rl run."""
    judges: Rewards | None = None
    """further measures, each by itself: reward models, functions and rules as in `rewards`, and imdb."""
    against: Literal["start", "all"] = "start"
    """win rates against the start, or against each other too."""
    tie: NotNegative = 0.0
    """scores that differ by at most this are a tie, which counts half."""
    bucket: Name | None = None
    """also tables by the values of this column of the prompts, or by the prompts' `length`."""
    heat_maps: CountOrZero = 32
    """the first so many prompts whose answers get a page with token heat maps."""
    bootstrap: Count = 2000
    """resamples of the prompts for the intervals of differences."""
    timeout: Seconds | None = 600.0
    """seconds that a call of a user-supplied reward or judge may take; null for no limit."""
    output: Name = "runs/evaluate"
    """run folder of a comparison of `policies`."""
    judge: Switch = True
    """without `policies`: also ask a judge that never saw the reward model's data (TF-IDF and logistic regression)."""
    positive_label: Label | None = None
    """name or number of the reward model's label whose logit raises the score, null takes the run's."""
    pad_token: Word | None = None
    """a token of the vocabulary to pad with; null is the tokenizer's own, or EOS where it has none."""
    seed: Seed = 1
    """random seed; the start and the policies are sampled with the same one."""
    device: Device = "auto"
    """where the models compute."""
    threads: Count | None = None
    """processor threads of torch; null takes OMP_NUM_THREADS where it is set, else the cores that are free."""
    dtype: Dtype = "auto"
    """of policies and start: auto (bfloat16 where the processor has it), float32, bfloat16."""
    fast_kernels: Switch = True
    """faster layers, equal up to rounding; off, every layer is that of transformers."""
    disk_wait: NotNegative = 300.0
    """seconds to wait for space on a full disk before a comparison ends; 0 ends it at once."""
    sampling: EvaluationSampling = Field(default_factory=EvaluationSampling)


ONE_RUN = ("run", "judge")  # settings of the evaluation of one run, and those of both kinds
BOTH = ("prompts", "split", "skip_bad_rows", "count", "positive_label", "seed", "device", "threads", "dtype")


def compares(config: EvaluateConfig) -> bool:
    """Whether policies are compared, rather than one run with its start.

    Raises:
        ConfigError: a setting of the other kind was changed, which would do nothing.
    """
    wanted = config.policies is not None
    given, default = to_dict(config), to_dict(EvaluateConfig())
    others = ONE_RUN if wanted else [name for name in given if name not in (*ONE_RUN, *BOTH, "policies")]
    changed = next((name for name in others if given[name] != default[name]), None)
    if changed is None:
        return wanted
    if not wanted:
        expected = "its default: it is of a comparison of policies, and none are given"
        raise ConfigError(changed, given[changed], expected, "Add --policies, such as --policies runs/rl.")
    expected = "its default: it is of the evaluation of one run, and policies are given"
    fix = "Put the run among --policies." if changed == "run" else "Use --judges imdb for this judge."
    raise ConfigError(changed, given[changed], expected, fix)
