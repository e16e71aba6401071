"""Monitor for a gap between the sampler's and the trainer's log-probabilities of the same tokens."""

from __future__ import annotations

from collections.abc import Mapping

from apportion.monitors._monitor import MetricHistory, Monitor, share


def sampler_gap(*, least: float = 0.1, rise: float = 5.0, most: float = 0.3) -> Monitor:
    """Return a monitor on sampling/logprob_gap (mean absolute nats a token): above `most`, or above `least` and `rise`
    times the start.

    Two ways to compute the same model differ by 1e-6 in float32 and by 0.004 to 0.046 in bfloat16 (measured on runs of
    SmolLM2). Ratios and the KL penalty treat the difference as a change of the policy.
    """
    key = "sampling/logprob_gap"

    def check(metrics: Mapping[str, MetricHistory]) -> str | None:
        gap = metrics[key]
        if gap.recent > most:
            return f"{key} {gap.recent:.3g} nats a token"
        if gap.risen(least, rise):
            return f"{key} {gap.recent:.3g} nats a token, {share(gap.recent, gap.start)}"
        return None

    return Monitor(
        "sampler_gap",
        (key,),
        check,
        f"at most {most:g}, and at most {rise:g} times the start where it is above {least:g}",
        "the sampler and the trainer run the model differently: precision, attention kernels, padding or positions, "
        "another temperature, weights that were not synchronised",
        "Try --dtype float32; if the gap stays, the model's cached and full forwards differ (report it)",
    )
