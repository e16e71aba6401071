"""Monitor for an end token whose advantage depends on the length of the response: the bias of non-causal credit."""

from __future__ import annotations

from collections.abc import Mapping

from apportion.monitors._monitor import MetricHistory, Monitor


def length_bias(*, most: float = 0.5) -> Monitor:
    """Return a monitor on advantage/end_token_length_corr, the correlation over a batch's ended responses of the end
    token's advantage with the response's length: its running mean beyond ±`most`, after the run's start.

    Of n responses whose advantage does not depend on the length it is 1/√(n−1) off by chance: 0.30 for the least
    n = 12, and 0.13 in the running mean, of which `most` is almost four times. Inactive where no response ends by
    itself (`sampling.stop: length`) and in batches with fewer ended ones.
    """
    key, end = "advantage/end_token_length_corr", "advantage/end_token"

    def check(metrics: Mapping[str, MetricHistory]) -> str | None:
        r = metrics[key]
        if r.start is None or abs(r.recent) <= most:
            return None
        pays = "long" if r.recent > 0 else "short"
        worth = f", at a mean advantage of {metrics[end].recent:.3g}" if end in metrics else ""
        return f"{key} {r.recent:.2g}: the end token of {pays} responses has the larger advantage{worth}"

    return Monitor(
        "length_bias",
        (key, end),
        check,
        f"within ±{most:g} in the running mean: where to end should not be paid by how long the response is",
        "a credit that is not causal (uniform, attention, policy_attention, attribution, shapley), which pays earlier "
        "tokens by later ones and leaves the end token the rest; a score that depends on length; a critic that does "
        "not know it yet",
        "Compare the credits with `apportion diagnose`, use a causal one (sparse, prefix_difference) or a smaller mix, "
        "or take the choice away with sampling.stop: length",
    )
