"""The policy of a run, loaded as its settings name it."""

from __future__ import annotations

from apportion.config import RLConfig
from apportion.models.policy import Policy, load_policy
from apportion.models.reward import RewardModel
from apportion.models.value_head import ValueStart


def make_policy(config: RLConfig, reward: RewardModel | None = None) -> Policy:
    """Return the policy to train, its values and its reference.

    Args:
        reward: the run's reward model; required where ppo.value_model is "reward".

    Raises:
        ModelError, ConfigError: as `load_policy` does.
    """
    return load_policy(
        config.policy,
        lora=config.lora,
        max_length=config.sampling.max_length,
        dtype=config.dtype,
        device=config.device,
        pad_token=config.pad_token,
        stop=config.sampling.stop,
        temperature=config.sampling.temperature,
        values=ValueStart(config.ppo.value_model, reward, config.scores),
        fast_kernels=config.fast_kernels,
    )
