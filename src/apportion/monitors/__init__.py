"""Monitors: rules over the logged metrics of a run, relative to the run's own start; one rule a file."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from apportion.monitors._monitor import Alert, MetricHistory, Monitor, init, observe
from apportion.monitors.entropy import entropy
from apportion.monitors.kl import kl
from apportion.monitors.length import length
from apportion.monitors.length_bias import length_bias
from apportion.monitors.negative_kl import negative_kl
from apportion.monitors.ratio import ratio
from apportion.monitors.reward import reward
from apportion.monitors.sampler_gap import sampler_gap
from apportion.monitors.value_loss import value_loss

FACTORIES = (negative_kl, sampler_gap, ratio, entropy, length, length_bias, reward, value_loss, kl)
MONITORS: Mapping[str, Callable[..., Monitor]] = {f.__name__: f for f in FACTORIES}
__all__ = ["MONITORS", "Alert", "MetricHistory", "Monitor", "init", "observe"]
