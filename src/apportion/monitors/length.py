"""Monitor for responses that grow or shrink out of proportion: a reward that depends on length."""

from __future__ import annotations

from collections.abc import Mapping

from apportion.monitors._monitor import MetricHistory, Monitor, share


def length(*, rise: float = 3.0, fall: float = 1 / 3) -> Monitor:
    """Return a monitor on objective/length (tokens a response): its running mean above `rise` or below `fall` times the
    start. With `sampling.stop: length` it is constant and never fires."""
    key = "objective/length"

    def check(metrics: Mapping[str, MetricHistory]) -> str | None:
        history = metrics[key]
        if history.start is None or fall * history.start <= history.recent <= rise * history.start:
            return None
        return f"{key} {history.recent:.3g} tokens a response, {share(history.recent, history.start)}"

    return Monitor(
        "length",
        (key,),
        check,
        f"between {fall:.2g} and {rise:g} times the run's start",
        "a reward that grows with length (or with its absence), no reward for ending, responses cut off at the limit "
        "that count as over (ppo.truncated)",
        "Add the credit length_penalty, set ppo.truncated, or compare score and length in the report",
        raises_kl_coef=True,
    )
