"""Scores of all answers: each reward model is loaded once, equal answers to a prompt are scored once."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

from apportion.evidence import Models
from apportion.evidence.models import SOURCE_ROW
from apportion.generation.given import given_rollouts
from apportion.models.loading import pick_device
from apportion.models.policy import Policy
from apportion.models.reward import RewardModel, check_length, load_reward
from apportion.models.text.token_spans import PolicyText
from apportion.rewards import Rewards
from apportion.rewards.model import ModelSource
from apportion.stages.evaluate.comparison.entries import LONGEST
from apportion.stages.evaluate.comparison.given import Answers
from apportion.stages.evaluate.comparison.heat_maps import FILE as CREDIT
from apportion.stages.evaluate.comparison.heat_maps import credit_rows, token_rows
from apportion.stages.evaluate.comparison.measures import IMDB, Measure, naming, weighted_sum
from apportion.stages.evaluate.comparison.opening import Comparison
from apportion.stages.evaluate.comparison.store import stored
from apportion.stages.evaluate.judge import fit_judge
from apportion.system.progress import activity, counted
from apportion.types import Rollouts
from apportion.user_code import UserCode

AT_ONCE = 64  # answers of a call of a reward
Scores = dict[str, list[list[float | None]]]  # by policy, prompt and answer; None where the measure does not apply


class Scored:
    """The distinct answers of everyone: equal ones to a prompt are one.

    Attributes:
        texts, ids, ended, owners: of each distinct answer, its first owner as (name, prompt, answer).
        places: the number of an answer by (name, prompt, answer).
    """

    def __init__(self, answers: Mapping[str, Answers]) -> None:
        self.texts: list[str] = []
        self.ids: list[list[int]] = []
        self.ended: list[bool] = []
        self.owners: list[tuple[str, int, int]] = []
        self.places: dict[tuple[str, int, int], int] = {}
        known: dict[tuple[int, tuple[int, ...], str], int] = {}
        for name, given in answers.items():
            for i, group in enumerate(given.ids):
                for k, ids in enumerate(group):
                    text, end = given.texts[i][k], given.ended[i][k]
                    place = known.setdefault((i, tuple(ids), text), len(known))
                    if place == len(self.texts):
                        self.texts.append(text)
                        self.ids.append(ids)
                        self.ended.append(end is not False)
                        self.owners.append((name, i, k))
                    self.places[name, i, k] = place

    def spread(self, values: Sequence[float | None], answers: Mapping[str, Answers]) -> list[dict[str, Any]]:
        """Return a row a prompt, {policy: [value an answer]}, from one value for each distinct answer."""
        count = len(next(iter(answers.values())).ids)
        return [
            {
                name: [values[self.places[name, i, k]] for k in range(len(given.ids[i]))]
                for name, given in answers.items()
            }
            for i in range(count)
        ]


def all_scores(comparison: Comparison, answers: Mapping[str, Answers]) -> dict[str, Scores]:
    """Return the scores of everyone by measure; those of a resumed comparison come from scores/.

    Raises:
        UserCodeError, DataError, ScoreError: a reward or judge failed; the policy, the prompt and the answer are named.
    """
    found, distinct = dict[str, Scores](), Scored(answers)
    for measure in (one for one in comparison.measures if not one.parts):

        def make(measure: Measure = measure) -> list[dict[str, Any]]:
            with activity(f"scoring by {measure.key}"):
                return distinct.spread(_values(comparison, measure, distinct, answers), answers)

        rows = stored(comparison.run, f"scores/{_file_name(measure.key)}.jsonl", make, len(comparison.contents))
        found[measure.key] = {name: [row[name] for row in rows] for name in answers}
    if comparison.config.heat_maps:
        stored(comparison.run, CREDIT, lambda: token_rows(comparison, answers))
    for measure in (one for one in comparison.measures if one.parts):
        found[measure.key] = _sums(measure, found, answers)
    return {measure.key: found[measure.key] for measure in comparison.measures}


def _file_name(key: str) -> str:
    name = key.replace("/", ".")
    return name if len(name.encode()) <= LONGEST else f"{name[:12]}-{hashlib.sha256(name.encode()).hexdigest()[:16]}"


def _sums(measure: Measure, found: Mapping[str, Scores], answers: Mapping[str, Answers]) -> Scores:
    keys = [key for key, _ in measure.parts]
    return {
        name: [
            [
                weighted_sum({key: found[key][name][i][k] for key in keys}, measure.parts)
                for k in range(len(given.ids[i]))
            ]
            for i in range(len(given.ids))
        ]
        for name, given in answers.items()
    }


def _values(
    comparison: Comparison, measure: Measure, distinct: Scored, answers: Mapping[str, Answers]
) -> list[float | None]:
    """Return one measure's value of every distinct answer, None where it does not apply."""
    if measure.spec is None:
        judge = fit_judge(IMDB, field="judges")
        return [float(p) for p in judge.probability(distinct.texts)]
    models = scoring_models(comparison)
    rewards = measure.rewards
    if measure.folder is not None:
        reward = load_judge(comparison, measure, max(map(len, distinct.ids), default=0))
        rewards = Rewards([measure.spec], {measure.spec.name: ModelSource(measure.spec.name, reward)})
        if comparison.config.heat_maps:
            stored(comparison.run, CREDIT, lambda: credit_rows(comparison, measure, models, reward, answers))
    assert rewards is not None
    values: list[float | None] = []
    firsts = range(0, len(distinct.texts), AT_ONCE)
    for first in counted(firsts, "batch", len(firsts), unit="batch"):
        places = range(first, min(first + AT_ONCE, len(distinct.texts)))
        with naming([distinct.owners[i] for i in places]):
            found = rewards.each(models, _batch(comparison, distinct, places, models))[measure.spec.name]
        values += [None if math.isnan(value) else value for value in found.tolist()]
    return values


def scoring_models(comparison: Comparison) -> Models:
    """Return what rewards are called with: the comparison's tokenizer, and the prompts' columns and conversations."""
    policy = Policy(None, comparison.tokenizer, [])  # only its tokenizer is used
    models = Models(policy, None, columns=comparison.prompts.columns)
    models.conversations = comparison.prompts.conversations
    models.user_code = UserCode(comparison.config.timeout, "timeout")
    return models


def load_judge(comparison: Comparison, measure: Measure, longest: int) -> RewardModel:
    """Return the reward model of a measure, which scores the comparison's ids or their text.

    Args:
        longest: tokens of the longest answer; given ones may have more than `sampling.max_new_tokens`.
    """
    config = comparison.config
    text = PolicyText(comparison.tokenizer, comparison.prompts.conversations, cuts=comparison.sampling.stop == "eos")
    assert measure.folder is not None
    loading: dict[str, Any] = {"dtype": "float32", "device": config.device, "pad_token": config.pad_token}
    loading |= {"fast_kernels": config.fast_kernels, "positive": config.positive_label, "field": measure.setting}
    reward = load_reward(measure.folder, **loading, policy=text)
    check_length(measure.setting, reward, comparison.prompts.rows, longest)
    return reward


def _batch(comparison: Comparison, distinct: Scored, places: Sequence[int], models: Models) -> Rollouts:
    """Return distinct answers as rollouts, with the place of each one's prompt."""
    prompts = [distinct.owners[i][1] for i in places]
    rows = [comparison.prompts.rows[i] for i in prompts]
    ids, ended = [distinct.ids[i] for i in places], [distinct.ended[i] for i in places]
    device = pick_device(comparison.config.device)
    rollouts = given_rollouts(rows, ids, models.policy.pad, device, group=prompts, ended=ended)
    return rollouts.with_evidence(**{SOURCE_ROW: rollouts.group}) if comparison.prompts.columns else rollouts
