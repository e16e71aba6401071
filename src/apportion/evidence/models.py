"""The models and settings from which evidence is produced."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from apportion.config.sections import SamplingConfig, ScoreConfig
from apportion.errors import ConfigError
from apportion.models.policy import Policy
from apportion.models.reward import RewardModel
from apportion.system.file_weights import FileWeights
from apportion.types import Rollouts, Segmenter
from apportion.user_code import UserCode

SOURCE_ROW = "source_row"  # evidence (B,) int64: the place of each prompt among the run's prompts, of `Models.columns`


class Scorer(Protocol):
    """The rewards of a run, other than one reward model alone (`rewards.Rewards`)."""

    @property
    def wanted(self) -> frozenset[str] | None:
        """The columns of the prompts' rows that are to be kept; None for all."""

    @property
    def model_weight(self) -> float:
        """The weight of the reward model whose evidence the run has."""

    @property
    def may_be_dense(self) -> bool:
        """Whether rewards a token may be among them, evidence "dense_rewards" (B,T)."""

    def check_columns(self, columns: Sequence[Mapping[str, Any]]) -> None:
        """Raise DataError for rows without a column that is needed, or with one that cannot be used."""

    def score(self, models: Models, rollouts: Rollouts, model_scores: Tensor | None) -> Rollouts:
        """Return the rollouts with scores (B,) and evidence "raw_scores" (B,), and each reward's own.

        `model_scores` (B,) are the raw scores of `Models.reward`, None without one.
        """

    def standardise(self, models: Models, rollouts: Rollouts) -> Rollouts:
        """Return scored rollouts whose rewards are standardised over all processes' batch, where settings ask for it.

        Every process calls it for its part of the batch.
        """

    def totals(self, models: Models, rollouts: Rollouts, *, dense: bool = True) -> Tensor:
        """Return the score (B,) of other texts than the batch's, in the units of its scores.

        Rewards a token are summed, or, without `dense`, a ConfigError.
        """


@dataclass
class Models:
    """The sources of evidence of a run.

    Attributes:
        policy, reward: the run's two models; no reward model where no reward is one.
        segment: the run's segmenter, which defines an action.
        sampling, generator: how the policy samples, for producers that generate further responses (vine).
        scores: centring, scaling and clipping of scores, for producers that score further texts.
        others: further models by the path in a setting, loaded when a producer first needs one.
        user_code: calls user-supplied functions within their time limit.
        columns: the columns of each of the run's prompts, the same in all; evidence "source_row" says whose.
        conversations: the turns of prompts that are conversations, by the prompt's ids.
        rewards: the run's rewards; None where the score is that of `reward` alone.
        frozen: the weights of reward models and reference in a file; None where they stay in memory.
    """

    policy: Policy
    reward: RewardModel | None
    segment: Segmenter | None = None
    sampling: SamplingConfig | None = None
    generator: torch.Generator | None = None
    scores: ScoreConfig = field(default_factory=ScoreConfig)
    others: dict[str, Any] = field(default_factory=dict)
    user_code: UserCode = field(default_factory=UserCode)
    columns: Sequence[Mapping[str, Any]] = ()
    conversations: Mapping[tuple[int, ...], Sequence[Mapping[str, Any]]] = field(default_factory=dict)
    rewards: Scorer | None = None
    frozen: FileWeights | None = None

    @property
    def reward_model(self) -> RewardModel:
        """The reward model. Raises ConfigError where no reward is one."""
        if self.reward is None:
            fix = "Add a reward model to rewards, or use a method that needs none: sparse, uniform, process."
            raise ConfigError("evidence", "rewards without a reward model", "a reward model, which makes it", fix)
        return self.reward

    def release_frozen(self) -> None:
        """Give the memory of frozen weights back, where they are in a file, until they are used again."""
        if self.frozen is not None:
            self.frozen.release()
