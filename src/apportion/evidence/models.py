"""The models and settings from which evidence is produced."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from apportion.config.sections import SamplingConfig, ScoreConfig
from apportion.models.policy import Policy
from apportion.models.reward import RewardModel
from apportion.types import Segmenter
from apportion.user_code import UserCode


@dataclass
class Models:
    """The sources of evidence of a run.

    Attributes:
        policy, reward: the run's two models. segment: the run's segmenter, which defines an action.
        sampling, generator: how the policy samples, for producers that generate further responses (vine).
        scores: centring, scaling and clipping of scores, for producers that score further texts.
        others: further models by the path in a setting, loaded when a producer first needs one.
        user_code: calls user-supplied functions within their time limit.
        columns: the columns of each of the run's prompts, the same in all; evidence "source_row" says whose.
    """

    policy: Policy
    reward: RewardModel
    segment: Segmenter | None = None
    sampling: SamplingConfig | None = None
    generator: torch.Generator | None = None
    scores: ScoreConfig = field(default_factory=ScoreConfig)
    others: dict[str, Any] = field(default_factory=dict)
    user_code: UserCode = field(default_factory=UserCode)
    columns: Sequence[Mapping[str, Any]] = ()
