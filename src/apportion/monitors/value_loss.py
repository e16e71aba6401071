"""Monitor for a diverging critic."""

from __future__ import annotations

from collections.abc import Mapping

from apportion.monitors._monitor import MetricHistory, Monitor, share


def value_loss(*, rise: float = 10.0, least: float = 0.01) -> Monitor:
    """Return a monitor on loss/value (½ squared error): its running mean above `least`, `rise` times the start, and
    `rise` times the loss of a constant critic, ½ objective/scores_std².

    The last is for equal scores at the start: the first success of a sparse reward is no divergence. The monitor is
    inactive without a critic. Healthy runs stay within twice their start.
    """
    key, spread = "loss/value", "objective/scores_std"

    def check(metrics: Mapping[str, MetricHistory]) -> str | None:
        history = metrics[key]
        if not history.risen(least, rise):
            return None
        std = max(metrics[spread].recent, metrics[spread].value) if spread in metrics else 0.0
        if history.recent <= rise * std**2 / 2:
            return None
        return f"{key} {history.recent:.3g}, {share(history.recent, history.start)}"

    return Monitor(
        "value_loss",
        (key, spread),
        check,
        f"at most {rise:g} times the run's start, or {rise:g} times half the scores' variance",
        "a learning rate too large for the value head, scores whose scale moves, returns outside what value_clip can "
        "follow, a shared trunk that the policy moves",
        "Lower optim.lr or ppo.value_coef, set scores.scale and scores.center, or ppo.value_model separate",
    )
