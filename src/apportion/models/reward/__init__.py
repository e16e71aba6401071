"""Reward models: loading one, how it reads a text, its score, and the attention of the position of its score."""

from apportion.models.reward.loading import STATISTICS, check_length, check_width, load_reward, read_statistics
from apportion.models.reward.model import RewardModel, adjust

__all__ = ["STATISTICS", "RewardModel", "adjust", "check_length", "check_width", "load_reward", "read_statistics"]
