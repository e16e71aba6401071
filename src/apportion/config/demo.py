"""Settings of `apportion demo`."""

from __future__ import annotations

from pydantic import Field

from apportion.config.schema.rules import Count, Dtype, Name, Positive, Seed, Spec, Trackers
from apportion.config.schema.section import Section


class DemoConfig(Section):
    """`apportion demo`: reward model, PPO with dense credit, an independent judge, and a page that shows it. It
    measures the machine for a second, fits the amounts of work to `minutes`, and prints each part with its time before
    anything is loaded; `--dry_run` prints that, and stops."""

    output: Name = "runs/demo"
    """folder of the stages, the report and summary.json."""
    minutes: Positive | None = None
    """minutes that it may take, without the install; null is 7.5 in bfloat16 and 16 in float32."""
    steps: Count | None = None
    """batches of PPO; null takes from 20 to 30, as many as fit the minutes."""
    credit: Spec = "prefix_difference"
    """the credit method: prefix_difference, attention (ABC), uniform, sparse, policy_attention, or a spec."""
    excerpts: Count | None = None
    """training excerpts of the reward model; null takes from 3,000 to 8,000, as many as fit the minutes."""
    count: Count = 128
    """fresh prompts for the evaluation before and after."""
    lr: Positive = 6e-4
    """learning rate of PPO."""
    seed: Seed = 0
    """random seed."""
    dtype: Dtype = "auto"
    """of policy and reward model: auto (bfloat16 where the processor has it), float32, bfloat16."""
    threads: Count | None = None
    """processor threads of torch; null takes OMP_NUM_THREADS where it is set, else the cores that are free."""
    trackers: Trackers = Field(default_factory=list)
    """where both stages log every metric too: tensorboard, wandb, trackio, one or several; empty for nowhere."""
