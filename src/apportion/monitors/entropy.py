"""Monitors for an entropy that collapses: the policy writes the same thing whatever it is asked."""

from __future__ import annotations

from collections.abc import Mapping

from apportion.monitors._monitor import MetricHistory, Monitor, share


def entropy(*, fall: float = 0.3, floor: float = 0.005) -> Monitor:
    """Return a monitor of objective/entropy (nats a token): running mean below `fall` of the start, or below `floor`.

    A run that learns loses entropy: the demo's keeps 0.77 of its start, one pushed further 0.68.
    """
    key = "objective/entropy"

    def judge(tracks: Mapping[str, MetricHistory]) -> str | None:
        found = tracks[key]
        if found.start is not None and found.recent < fall * found.start:
            return f"{key} {found.recent:.3g} nats a token, {share(found.recent, found.start)}"
        return f"{key} {found.recent:.3g} nats a token" if found.recent < floor else None

    return Monitor(
        "entropy",
        (key,),
        judge,
        f"at least {100 * fall:g}% of the run's start and {floor:g} nats a token",
        "a learning rate or clip too large, a KL coefficient too small, a reward that one phrase maximises, too many "
        "epochs a batch",
        "Raise the KL coefficient (--credit.kl_penalty.coef), lower optim.lr, and read the samples",
        tightens=True,
    )
