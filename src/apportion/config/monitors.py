"""The settings of a run's monitors. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass
class MonitorsConfig:
    """Actions when a run goes wrong. Each monitor: off, warn, stop, or raise_kl_coef (kl, entropy, length, reward).

    `warn` names it once an episode, `stop` ends the run with its rollouts saved, `raise_kl_coef` raises it
    while it fires. docs/monitors.md has the thresholds.

    Attributes:
        max_skipped: updates in a row whose loss or gradient is not finite before the run stops; each one is skipped.
        timeout: seconds that a call of a function of yours may take; null for no limit.
        negative_kl: the KL from the reference falls below zero.
        sampler_gap: the sampler's and the trainer's log-probabilities part.
        ratio: probability ratios blow up within an update.
        entropy: the policy's entropy collapses.
        length: responses grow or shrink out of proportion.
        reward: every response gets the same score.
        value_loss: the critic diverges.
        kl: the policy runs away from the reference.
    """

    max_skipped: int = 3
    timeout: float | None = 600.0
    negative_kl: str | bool = "warn"
    sampler_gap: str | bool = "warn"
    ratio: str | bool = "warn"
    entropy: str | bool = "warn"
    length: str | bool = "warn"
    reward: str | bool = "warn"
    value_loss: str | bool = "warn"
    kl: str | bool = "warn"

    def __post_init__(self) -> None:
        for f in fields(self):  # YAML reads `off` as false
            if getattr(self, f.name) is False:
                setattr(self, f.name, "off")
