"""Monitor for a saturated reward: every response gets the same score, so that there is no gradient."""

from __future__ import annotations

from collections.abc import Mapping

from apportion.monitors._monitor import MetricHistory, Monitor, share


def reward(*, fall: float = 0.1, clipped: float = 0.9) -> Monitor:
    """Return a monitor on objective/scores_std: its running mean at or below `fall` of the start; and, where scores are
    clipped, on objective/scores_clipped, the share of a batch at the clip, above `clipped` in the running mean."""
    key, at_clip = "objective/scores_std", "objective/scores_clipped"

    def check(metrics: Mapping[str, MetricHistory]) -> str | None:
        spread = metrics[key]
        if spread.start is not None and spread.recent <= fall * spread.start:
            return f"{key} {spread.recent:.3g}, {share(spread.recent, spread.start)}"
        if at_clip in metrics and metrics[at_clip].recent > clipped:
            return f"{at_clip} {metrics[at_clip].recent:.3g}: the share of scores at the clip (scores.clip)"
        return None

    return Monitor(
        "reward",
        (key, at_clip),
        check,
        f"a spread above {100 * fall:g}% of the run's start, and at most {100 * clipped:g}% of scores at the clip",
        "the policy exploits what the reward model cannot distinguish (or all prompts are solved), the scores are "
        "clipped or constant, the reward model scores something other than the response",
        "Read the samples, raise the KL coefficient or scores.clip, take harder prompts, or end the run here",
        raises_kl_coef=True,
    )
