"""Monitor for a collapse of the policy's entropy: equal responses to every prompt."""

from __future__ import annotations

from collections.abc import Mapping

from apportion.monitors._monitor import MetricHistory, Monitor, share


def entropy(*, fall: float = 0.3, floor: float = 0.005) -> Monitor:
    """Return a monitor of objective/entropy (nats a token): running mean below `fall` of the start, or below `floor`.

    A learning run loses entropy: the demo ends at 0.77 of its start, a stronger one at 0.68.
    """
    key = "objective/entropy"

    def check(metrics: Mapping[str, MetricHistory]) -> str | None:
        history = metrics[key]
        if history.start is not None and history.recent < fall * history.start:
            return f"{key} {history.recent:.3g} nats a token, {share(history.recent, history.start)}"
        return f"{key} {history.recent:.3g} nats a token" if history.recent < floor else None

    return Monitor(
        "entropy",
        (key,),
        check,
        f"at least {100 * fall:g}% of the run's start and {floor:g} nats a token",
        "a learning rate or clip too large, a KL coefficient too small, a reward that one phrase maximises, too many "
        "epochs a batch",
        "Raise the KL coefficient (--credit.kl_penalty.coef), lower optim.lr, and read the samples",
        raises_kl_coef=True,
    )
