"""Monitors for a critic that diverges."""

from __future__ import annotations

from collections.abc import Mapping

from apportion.monitors._monitor import MetricHistory, Monitor, share


def value_loss(*, rise: float = 10.0, least: float = 0.01) -> Monitor:
    """Return a monitor on loss/value (½ squared error): its running mean above `least`, `rise` times the start, and
    `rise` times what a critic that knows the mean alone would lose, ½ objective/scores_std².

    The last is for scores that were all alike at the start: the first success of a sparse reward is no divergence. It
    is silent without a critic. Healthy runs stay within twice their start.
    """
    key, spread = "loss/value", "objective/scores_std"

    def judge(tracks: Mapping[str, MetricHistory]) -> str | None:
        found = tracks[key]
        if not found.risen(least, rise):
            return None
        std = max(tracks[spread].recent, tracks[spread].value) if spread in tracks else 0.0
        if found.recent <= rise * std**2 / 2:
            return None
        return f"{key} {found.recent:.3g}, {share(found.recent, found.start)}"

    return Monitor(
        "value_loss",
        (key, spread),
        judge,
        f"at most {rise:g} times the run's start, or {rise:g} times half the scores' variance",
        "a learning rate too large for the value head, scores whose scale moves, returns outside what value_clip can "
        "follow, a shared trunk that the policy moves",
        "Lower optim.lr or ppo.value_coef, set scores.scale and scores.center, or ppo.value_model separate",
    )
