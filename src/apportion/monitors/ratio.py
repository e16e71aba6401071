"""Monitor for exploding importance ratios within one batch's update."""

from __future__ import annotations

from collections.abc import Mapping

from apportion.monitors._monitor import MetricHistory, Monitor, share


def ratio(*, most: float = 0.5, least: float = 0.1, rise: float = 10.0, limited: float = 0.01) -> Monitor:
    """Return a monitor on policy/approxkl, the k3 of the ratios in nats a token: above `most` in one batch, or in the
    running mean above `least` and `rise` times the start; and on policy/ratio_limited above `limited`.

    k3 = ρ − 1 − log ρ grows with the ratio itself, so one token in a thousand with ρ = 500 is enough. Healthy updates
    stay below 0.03 (runs of SmolLM2 at learning rates up to 5e-4).
    """
    key, cut = "policy/approxkl", "policy/ratio_limited"

    def check(metrics: Mapping[str, MetricHistory]) -> str | None:
        kl = metrics[key]
        if cut in metrics and metrics[cut].value > limited:
            return f"{cut} {metrics[cut].value:.3g}: the share of tokens whose ratio is beyond e^±20"
        if kl.value > most:
            return f"{key} {kl.value:.3g} nats a token in one batch"
        if kl.risen(least, rise):
            return f"{key} {kl.recent:.3g} nats a token, {share(kl.recent, kl.start)}"
        return None

    return Monitor(
        "ratio",
        (key, cut),
        check,
        f"at most {most:g} nats a token in a batch, {least:g} in the running mean, ratios within e^±20",
        "steps too large for the batch (optim.lr, ppo.epochs), a learning rate without warm-up, advantages that are "
        "not whitened, or a sampler that differs from the trainer (sampling/logprob_gap)",
        "Lower optim.lr or ppo.epochs, raise optim.warmup",
    )
