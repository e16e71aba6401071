"""Monitor for a negative KL: the sampler and the trainer disagree on the sampling distribution."""

from __future__ import annotations

from collections.abc import Mapping

from apportion.monitors._monitor import MetricHistory, Monitor


def negative_kl(*, mean: float = -1.0, once: float = -5.0) -> Monitor:
    """Return a monitor firing when objective/kl (nats a response) is below `once`, or its running mean below `mean`.

    An expected log-ratio under the policy that sampled cannot be negative. A batch's estimate can, by chance: of n
    rollouts with KL k it has standard deviation √(2k/n) (log-ratios near 0), so it is below −4.5/n once in a thousand
    batches at most, whatever k is. Source: TRL's guide to PPO, "What is the concern with negative KL divergence?".
    """
    key = "objective/kl"

    def check(metrics: Mapping[str, MetricHistory]) -> str | None:
        kl = metrics[key]
        if kl.value >= once and kl.recent >= mean:
            return None
        return f"{key} {kl.value:.3g} nats a response, {kl.recent:.3g} in the running mean"

    return Monitor(
        "negative_kl",
        (key,),
        check,
        f"at least {mean:g} in the running mean and {once:g} in a batch",
        "the tokens were not sampled from the distribution whose log-probabilities are used (a filter such as top-k, "
        "another temperature, a banned token), or the sampler and the trainer compute different numbers",
        "Compare sampling/logprob_gap, use plain sampling, and try --dtype float32",
    )
