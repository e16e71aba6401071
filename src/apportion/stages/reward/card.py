"""Card of a trained reward model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from apportion.config import RewardConfig
from apportion.models.reward.mean import IN_BIAS, IN_CONFIG, KEY
from apportion.stages.reward.excerpts import ExcerptPair
from apportion.stages.reward.inputs import Inputs
from apportion.training.publish.card import Card, rows_of
from apportion.training.publish.sources import Use

MEASURES = {
    "accuracy": "held-out accuracy",
    "length_only": "accuracy of preferring the longer answer",
    "gain_over_length": "their difference, paired",
    "ece": "expected calibration error",
    "score_interval": "R on held-out texts",
    "score_sd": "its standard deviation",
    "length_correlation": "correlation of R with length",
}


def reward_card(config: RewardConfig, given: Inputs, evaluation: Mapping[str, Any]) -> Card:
    """Return the card of a reward model; `evaluation` is empty before it is measured."""
    paired = not given.ranked and isinstance(given.excerpts[0], ExcerptPair)
    kind = "rankings" if given.ranked else "pairs of excerpts" if paired else "excerpts of labelled texts"
    return Card(
        title="Reward model",
        tag="reward-model",
        summary=f"A reward model trained on {len(given.excerpts)} {kind}: R = "
        + ("logit." if given.ranked else "logit(positive) − logit(negative)."),
        method=" ".join((*_method(config, given.ranked, paired), *_centred(evaluation))),
        data=_uses(config, f"{len(given.excerpts)} {kind}", len(given.test_rows)),
        results=rows_of(evaluation, MEASURES),
        measured="Intervals are Wilson's, clustered by prompt where texts share one, and normal for means of R.",
        limits=(
            "The held-out texts are of the same data: on what a policy learns to generate it may be wrong, and "
            "training against it finds out where.",
            "It learned what these annotators judged, their errors and their taste for length included.",
            "R has no unit: only differences for one prompt have a meaning, and not across reward models.",
        ),
        labels=1 if given.ranked else 2,
    )


def _method(config: RewardConfig, ranked: bool, paired: bool) -> list[str]:
    weights = (
        f"Adapters of rank {config.lora.rank} and the head were trained, and merged in float32."
        if config.lora.rank
        else "All weights were trained."
    )
    if ranked:
        loss = "Plackett–Luce" if config.preferences.loss == "plackett_luce" else "Bradley–Terry"
        return [f"Trained on rankings of whole completions by the {loss} loss.", weights]
    low, high = config.excerpt_tokens
    if paired:
        text = "Trained on preference pairs by the Bradley–Terry loss, which only differences of R have a part in,"
        return [f"{text} on excerpts of {low} to {high} tokens.", weights]
    return [f"Trained as a classifier by cross-entropy on excerpts of {low} to {high} tokens.", weights]


def _centred(evaluation: Mapping[str, Any]) -> list[str]:
    """Return what was subtracted from R, in sentences; none where nothing was."""
    if "subtracted_mean" not in evaluation:
        return []
    mean, over = evaluation["subtracted_mean"], evaluation["subtracted_over"]
    place = IN_CONFIG if evaluation["subtracted_in"] == KEY else IN_BIAS
    return [f"The mean reward over {over} was {mean:.6g} after training. {place}"]


def _uses(config: RewardConfig, training: str, held_out: int) -> list[Use]:
    rows = [Use("training", config.data, config.split, training)]
    if config.test_data is None:
        return [*rows, Use("evaluation, held out of it by a hash", config.data, config.split, f"{held_out} rows")]
    return [*rows, Use("evaluation", config.test_data, config.test_split, f"{held_out} rows")]
