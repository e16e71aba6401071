"""Monitor for a policy that diverges from its reference."""

from __future__ import annotations

from collections.abc import Mapping

from apportion.monitors._monitor import MetricHistory, Monitor


def kl(*, most: float = 2.0, jump: float = 4.0, step: float = 0.5) -> Monitor:
    """Return a monitor on objective/kl over objective/length, nats a token: the running means' ratio above `most`, or
    one batch above `jump` times the running mean before it plus `step`.

    The run's own start, 0, is no reference here. The demo ends near 0.3 nats a token, a stronger one near 0.7;
    a policy that always repeats one token has about 5.
    """
    key, size = "objective/kl", "objective/length"

    def check(metrics: Mapping[str, MetricHistory]) -> str | None:
        history, sizes = metrics[key], metrics.get(size, MetricHistory(1.0, 1.0))
        rate = history.recent / max(sizes.recent, 1.0)
        if rate > most:
            return f"{key} {rate:.3g} nats a token ({history.recent:.3g} a response)"
        before, tokens = history.before, max(sizes.value, 1.0)
        if before is not None and history.value > jump * max(before, 0.0) + step * tokens:
            return f"{key} {history.value:.3g} nats a response in one batch, after {before:.3g} in the running mean"
        return None

    return Monitor(
        "kl",
        (key, size),
        check,
        f"at most {most:g} nats a token, and no batch beyond {jump:g} times the last ones plus {step:g} a token",
        "a KL coefficient too small for the scale of the scores, a learning rate too large, a reward that text far "
        "from the reference maximises",
        "Raise the KL coefficient (--credit.kl_penalty.coef), give it a target, or lower optim.lr",
        raises_kl_coef=True,
    )
