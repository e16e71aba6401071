"""Rewards of a run: reward models, Python functions and rules behind one protocol, and their weighted sum."""

from apportion.rewards.mixture import Rewards
from apportion.rewards.opening import RULE_FACTORIES, add_models, open_rewards
from apportion.rewards.source import Batch, Columns, RewardSource

__all__ = ["RULE_FACTORIES", "Batch", "Columns", "RewardSource", "Rewards", "add_models", "open_rewards"]
