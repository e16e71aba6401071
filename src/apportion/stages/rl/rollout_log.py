"""Rows of rollouts.jsonl: texts with each token's credit, reward, advantage and KL."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from apportion.credit import REWARD_ATTENTION
from apportion.masking import normalise
from apportion.registry import EvidenceKey
from apportion.rewards.mixture import LOGGED
from apportion.stages.rl.learner import Learner
from apportion.training.crash_dump import DECIMALS
from apportion.types import Advantages, Credit, Rollouts


def rollout_records(
    learner: Learner, rollouts: Rollouts, rewards: Tensor, estimated: Advantages, step: int, count: int
) -> list[dict[str, Any]]:
    """Return the first `count` rollouts as plain mappings; per-token lists follow the response's masked tokens."""
    some = rollouts.select(torch.arange(min(count, len(rollouts)), device=rollouts.mask.device))
    rows = len(some)
    kl = torch.where(some.mask, some.logprobs - some.evidence["reference_logprobs"], 0.0)
    by_method = learner.compare.rewards(some)
    columns = {
        "credit": learner.rewards_before_kl(some),
        "kl": kl,
        "reward": rewards[:rows],
        "advantage": estimated.advantages[:rows],
        "logprob": some.logprobs,
    }
    if "values" in some.evidence:
        columns["value"] = some.evidence["values"]
    attention = attention_name(learner.method.credit)
    if attention in some.evidence:
        columns["alpha"] = normalise(some.evidence[attention], some.mask)[0]
    return [_record(learner.policy.tokenizer, some, i, step, columns, by_method) for i in range(rows)]


def attention_name(method: Credit) -> str:
    """Return the name of the attention evidence that a credit uses, the paper's where it uses none."""
    names = [need for need in method.needs if EvidenceKey.of(need).name == REWARD_ATTENTION]
    return min(names, default=REWARD_ATTENTION)


def _record(
    tokenizer: Any,
    rollouts: Rollouts,
    row: int,
    step: int,
    columns: Mapping[str, Tensor],
    by_method: Mapping[str, Tensor],
) -> dict[str, Any]:
    mask = rollouts.mask[row]
    ids = rollouts.response_ids[row][mask]
    prompt = rollouts.prompt_ids[row][rollouts.prompt_mask[row]]

    def numbers(values: Tensor) -> list[float]:
        return [round(float(v), DECIMALS) for v in values[row][mask]]

    ended = rollouts.evidence.get("sampled_ended", rollouts.ended)
    assert rollouts.scores is not None
    return {
        "step": step,
        "row": row,
        "prompt": tokenizer.decode(prompt),
        "text": tokenizer.decode(ids),
        "tokens": [tokenizer.decode([i]) for i in ids.tolist()],
        "prompt_ids": prompt.tolist(),
        "response_ids": ids.tolist(),
        "ended": None if ended is None else bool(ended[row]),
        "score": round(float(rollouts.scores[row]), DECIMALS),
        "raw_score": round(float(rollouts.evidence["raw_scores"][row]), DECIMALS),
        **_rewards(rollouts, row),
        **{name: numbers(values) for name, values in columns.items()},
        "methods": {name: numbers(values) for name, values in by_method.items()},
    }


def _rewards(rollouts: Rollouts, row: int) -> dict[str, Any]:
    """Return {"rewards": {name: number, null where it does not apply}} of a run with several, or {}."""
    given = {k.removeprefix(LOGGED): float(v[row]) for k, v in rollouts.evidence.items() if k.startswith(LOGGED)}
    found = {name: None if math.isnan(value) else round(value, DECIMALS) for name, value in given.items()}
    return {"rewards": found} if found else {}
