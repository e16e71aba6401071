"""The rewards and judges that a stage of a recipe names."""

from __future__ import annotations

from typing import Any

from apportion import registry
from apportion.config import RewardSpec, reward_specs

IMDB = "imdb"  # the judge of film reviews, which is none of `reward_specs`


def specs_of(config: Any, setting: str) -> list[RewardSpec]:
    """Return what "rewards" or "judges" names in the settings of an rl or evaluate stage.

    Raises:
        ConfigError: a setting of one that does not exist.
    """
    value = getattr(config, setting, None)
    if setting == "rewards":
        model = getattr(config, "reward_model", None)
        return reward_specs(model, value) if value is not None or model is not None else []
    if value is None:
        return []
    others = [{name: kwargs} for name, kwargs in registry.parse("judges", value) if name != IMDB]
    return reward_specs(None, others, "judges") if others else []
