"""Watches for a critic that diverges."""

from __future__ import annotations

from collections.abc import Mapping

from apportion.guards.watch import Track, Watch, share


def value_loss(*, rise: float = 10.0, least: float = 0.01) -> Watch:
    """Return a watch on loss/value (½ squared error): its running mean above `least` and `rise` times the start.

    It is silent without a critic. Healthy runs stay within twice their start.
    """
    key = "loss/value"

    def judge(tracks: Mapping[str, Track]) -> str | None:
        found = tracks[key]
        if found.start is None or found.recent <= max(least, rise * found.start):
            return None
        return f"{key} {found.recent:.3g}, {share(found.recent, found.start)}"

    return Watch(
        "value_loss",
        (key,),
        judge,
        f"at most {rise:g} times the run's start",
        "a learning rate too large for the value head, scores whose scale moves, returns outside what value_clip can "
        "follow, a shared trunk that the policy moves",
        "Lower optim.lr or ppo.value_coef, set scores.scale and scores.center, or ppo.value_model separate",
    )
