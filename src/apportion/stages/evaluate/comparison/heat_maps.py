"""Token credit of the first answers: where a reward model's score lands, by its scores of the text so far."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from apportion import credit
from apportion.config.sections import ScoreConfig
from apportion.credit import REWARD_ATTENTION
from apportion.errors import ModelError
from apportion.evidence import Models
from apportion.evidence.prefix import slow_prefixes
from apportion.evidence.reward import check_attention
from apportion.evidence.scoring import score
from apportion.generation.given import given_rollouts
from apportion.models.loading import pick_device
from apportion.models.reward import RewardModel
from apportion.stages.evaluate.comparison.given import Answers
from apportion.stages.evaluate.comparison.measures import Measure, naming
from apportion.stages.evaluate.comparison.opening import Comparison
from apportion.system.progress import counted
from apportion.types import Credit, Rollouts

FILE = "credit.jsonl"
SCORES = frozenset({"scores"})


@torch.no_grad()
def credit_rows(
    comparison: Comparison, measure: Measure, models: Models, reward: RewardModel, answers: Mapping[str, Answers]
) -> list[dict[str, Any]]:
    """Return a row for the first answer of everyone to each of the first prompts.

    A row has prompt (its place), policy, measure, tokens, score and `methods`: each credit method's reward on each
    token, in the units of the score.
    """
    method, assign = _method(reward, comparison.sampling.max_new_tokens)
    models = Models(models.policy, reward, columns=models.columns, conversations=models.conversations)
    device = pick_device(comparison.config.device)
    count = min(comparison.config.heat_maps, len(comparison.contents))
    rows: list[dict[str, Any]] = []
    for i in counted(range(count), "token credit", count, unit="prompt"):
        names = [name for name, given in answers.items() if given.ids[i] and given.ids[i][0]]
        if not names:
            continue
        ids = [answers[name].ids[i][0] for name in names]
        ended = [answers[name].ended[i][0] is not False for name in names]
        prompts, group = [comparison.prompts.rows[i]] * len(names), [i] * len(names)
        rollouts = given_rollouts(prompts, ids, models.policy.pad, device, group=group, ended=ended)
        with naming([(name, i, 0) for name in names]):
            scored, values = _credit(models, rollouts, assign)
        for place, (name, own) in enumerate(zip(names, ids, strict=True)):
            row = {"prompt": i, "policy": name, "measure": measure.key, "tokens": _tokens(comparison.tokenizer, own)}
            methods = {} if values is None else {method: values[place, : len(own)].tolist()}
            rows.append(row | {"score": float(scored[place]), "methods": methods})
    return rows


def token_rows(comparison: Comparison, answers: Mapping[str, Answers]) -> list[dict[str, Any]]:
    """Return the rows of `credit_rows` without a reward model: tokens only, for what else there is a token."""
    count = min(comparison.config.heat_maps, len(comparison.contents))
    return [
        {"prompt": i, "policy": name, "tokens": _tokens(comparison.tokenizer, given.ids[i][0]), "methods": {}}
        for i in range(count)
        for name, given in answers.items()
        if given.ids[i] and given.ids[i][0]
    ]


def _method(reward: RewardModel, tokens: int) -> tuple[str, Credit | None]:
    """Return (name, method): prefix differences where the forward that scores has them, else attention, or none."""
    if slow_prefixes(reward, tokens) is None:
        return "prefix_difference", credit.prefix_difference()
    try:
        check_attention(reward)
    except ModelError:
        return "", None
    return "attention", credit.attention()


def _credit(models: Models, rollouts: Rollouts, method: Credit | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    needs = frozenset[str]() if method is None else method.needs
    try:
        result = score(models, rollouts, needs, ScoreConfig(), always=SCORES)
    except ModelError:  # a model whose attention cannot be captured
        if method is None or REWARD_ATTENTION not in needs:
            raise
        return _credit(models, rollouts, None)
    assert result.scores is not None
    return result.scores, None if method is None else credit.apply(method, result)[0]


def _tokens(tokenizer: Any, ids: list[int]) -> list[str]:
    return [str(tokenizer.decode([i])) for i in ids]
