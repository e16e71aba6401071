"""Monitors for responses that grow or shrink out of proportion: a reward that length alone can move."""

from __future__ import annotations

from collections.abc import Mapping

from apportion.monitors._monitor import MetricHistory, Monitor, share


def length(*, rise: float = 3.0, fall: float = 1 / 3) -> Monitor:
    """Return a monitor on objective/length (tokens a response): its running mean above `rise` or below `fall` times the
    start. With `sampling.stop: length` it is constant and never fires."""
    key = "objective/length"

    def judge(tracks: Mapping[str, MetricHistory]) -> str | None:
        found = tracks[key]
        if found.start is None or fall * found.start <= found.recent <= rise * found.start:
            return None
        return f"{key} {found.recent:.3g} tokens a response, {share(found.recent, found.start)}"

    return Monitor(
        "length",
        (key,),
        judge,
        f"between {fall:.2g} and {rise:g} times the run's start",
        "a reward that grows with length (or with its absence), no reward for ending, responses cut off at the limit "
        "that count as over (ppo.truncated)",
        "Add the credit length_penalty, set ppo.truncated, or compare score and length in the report",
        tightens=True,
    )
