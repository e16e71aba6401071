"""A reward model as a reward source, beside the one whose score comes with the run's evidence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from apportion.batching import micro_batches, trim
from apportion.errors import ScoreError
from apportion.evidence.reward import reward_evidence
from apportion.models.reward import RewardModel
from apportion.rewards.source import Batch, Columns


class ModelSource:
    """A loaded reward model; see `RewardSource`. Its answers are its own scores, (B,)."""

    columns = Columns()
    user_supplied = may_be_dense = False

    def __init__(self, name: str, reward: RewardModel) -> None:
        self.name, self.reward = name, reward

    def __call__(self, batch: Batch) -> Tensor:
        """Return the scores (B,), in micro-batches of rows of similar length. Raises ScoreError with the rollout."""
        config, rollouts = batch.models.scores, batch.rollouts
        everyone = torch.arange(len(rollouts), device=rollouts.mask.device)
        scores = torch.zeros(len(rollouts), device=rollouts.mask.device)
        for rows in micro_batches(rollouts, everyone, config.micro_batch, config.micro_tokens):
            try:
                some = trim(rollouts.select(rows))
                scores[rows] = reward_evidence(self.reward, some, frozenset({"scores"}))["scores"].to(scores)
            except ScoreError as error:
                error.row = None if error.row is None else int(rows[error.row])
                raise
        return scores

    def check(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Check nothing: it takes no columns."""
