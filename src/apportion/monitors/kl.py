"""Monitors for a policy that runs away from its reference."""

from __future__ import annotations

from collections.abc import Mapping

from apportion.monitors._monitor import MetricHistory, Monitor


def kl(*, most: float = 2.0, jump: float = 4.0, step: float = 0.5) -> Monitor:
    """Return a monitor on objective/kl over objective/length, nats a token: the running means' ratio above `most`, or
    one batch above `jump` times the running mean before it plus `step`.

    A run's own start is no measure here: it is 0. The demo ends near 0.3 nats a token, one pushed further near 0.7;
    a policy that repeats one token regardless pays about 5.
    """
    key, size = "objective/kl", "objective/length"

    def judge(tracks: Mapping[str, MetricHistory]) -> str | None:
        found, sizes = tracks[key], tracks.get(size, MetricHistory(1.0, 1.0))
        rate = found.recent / max(sizes.recent, 1.0)
        if rate > most:
            return f"{key} {rate:.3g} nats a token ({found.recent:.3g} a response)"
        before, tokens = found.before, max(sizes.value, 1.0)
        if before is not None and found.value > jump * max(before, 0.0) + step * tokens:
            return f"{key} {found.value:.3g} nats a response in one batch, after {before:.3g} in the running mean"
        return None

    return Monitor(
        "kl",
        (key, size),
        judge,
        f"at most {most:g} nats a token, and no batch beyond {jump:g} times the last ones plus {step:g} a token",
        "a KL coefficient too small for the scale of the scores, a learning rate too large, a reward that text far "
        "from the reference maximises",
        "Raise the KL coefficient (--credit.kl_penalty.coef), give it a target, or lower optim.lr",
        tightens=True,
    )
