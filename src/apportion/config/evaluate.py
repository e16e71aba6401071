"""Settings of `apportion evaluate`."""

from __future__ import annotations

from apportion.config.schema.rules import Count, Device, Dtype, Label, Name, Seed, Switch
from apportion.config.schema.section import Section


class EvaluateConfig(Section):
    """`apportion evaluate`: a policy against its start on fresh prompts, judged by its reward model and by others."""

    run: Name = "runs/rl"
    """the folder of a finished `apportion rl` run."""
    prompts: Name = "imdb"
    """`imdb` (reviews that no stage was trained on), a file or folder, or a hub id."""
    split: Name | None = None
    """the split of `prompts` to read, of a folder or hub set with splits; null for train."""
    skip_bad_rows: Switch = False
    """skip unusable rows, count them and write them to evaluate_bad_rows.jsonl; off, the first is an error."""
    count: Count = 128
    """prompts to sample on, the first ones."""
    judge: Switch = True
    """also ask a judge that never saw the reward model's data (TF-IDF and logistic regression on IMDb)."""
    positive_label: Label | None = None
    """name or number of the reward model's label whose logit raises the score, null takes the run's."""
    seed: Seed = 1
    """random seed; the start and the policy are sampled with the same one."""
    device: Device = "auto"
    """where the models compute."""
    threads: Count | None = None
    """processor threads of torch; null takes OMP_NUM_THREADS where it is set, else the cores that are free."""
    dtype: Dtype = "auto"
    """of policy and start: auto (bfloat16 where the processor has it), float32, bfloat16."""
