"""Settings of `apportion demo`."""

from __future__ import annotations

from apportion.config.rules import Count, Name, Positive, Seed, Spec
from apportion.config.section import Section


class DemoConfig(Section):
    """`apportion demo`: reward model, PPO with dense credit, an independent judge, and a page that shows it."""

    output: Name = "runs/demo"
    """folder of the stages, the report and summary.json."""
    steps: Count = 30
    """batches of PPO."""
    credit: Spec = "attention"
    """the credit method: attention (ABC), uniform, sparse, policy_attention, or a spec."""
    excerpts: Count = 8000
    """training excerpts of the reward model."""
    count: Count = 128
    """fresh prompts for the evaluation before and after."""
    lr: Positive = 4e-4
    """learning rate of PPO."""
    seed: Seed = 0
    """random seed."""
    threads: Count | None = None
    """processor threads of torch; null takes OMP_NUM_THREADS where it is set, else the cores that are free."""
