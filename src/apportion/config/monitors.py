"""Settings of a run's monitors."""

from __future__ import annotations

from apportion.config.schema.rules import Action, Count, KLAction, Seconds
from apportion.config.schema.section import Section


class MonitorsConfig(Section):
    """Actions when a run goes wrong. Each monitor: off, warn, stop, or raise_kl_coef (kl, entropy, length, reward).

    `warn` reports it once an episode, `stop` ends the run with its rollouts saved, `raise_kl_coef` raises the KL
    coefficient while it fires. docs/monitors.md has the thresholds.
    """

    max_skipped: Count = 3
    """consecutive updates with a non-finite loss or gradient before the run stops; each one is skipped."""
    timeout: Seconds | None = 600.0
    """time limit of a call of a user-supplied function, in seconds; null for no limit."""
    negative_kl: Action = "warn"
    """the KL from the reference falls below zero."""
    sampler_gap: Action = "warn"
    """the sampler's and the trainer's log-probabilities differ."""
    ratio: Action = "warn"
    """probability ratios blow up within an update."""
    entropy: KLAction = "warn"
    """the policy's entropy collapses."""
    length: KLAction = "warn"
    """responses grow or shrink out of proportion."""
    length_bias: Action = "warn"
    """the end token's advantage depends on the length of the response."""
    reward: KLAction = "warn"
    """every response gets the same score."""
    value_loss: Action = "warn"
    """the value loss diverges."""
    kl: KLAction = "warn"
    """the policy moves too far from the reference."""
