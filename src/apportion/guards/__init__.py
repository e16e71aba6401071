"""The watches: one rule a file, over the metrics that a run logs anyway, judged against the run's own start."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from apportion.guards.entropy import entropy
from apportion.guards.kl import kl
from apportion.guards.length import length
from apportion.guards.negative_kl import negative_kl
from apportion.guards.ratio import ratio
from apportion.guards.reward import reward
from apportion.guards.sampler_gap import sampler_gap
from apportion.guards.value_loss import value_loss
from apportion.guards.watch import Finding, Track, Watch, init, observe

FACTORIES = (negative_kl, sampler_gap, ratio, entropy, length, reward, value_loss, kl)
WATCHES: Mapping[str, Callable[..., Watch]] = {f.__name__: f for f in FACTORIES}
__all__ = ["WATCHES", "Finding", "Track", "Watch", "init", "observe"]
