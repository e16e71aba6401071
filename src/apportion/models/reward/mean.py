"""Zero mean of a reward model: the mean reward is subtracted in its head's bias, or stored for loaders to subtract."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch

from apportion.errors import ModelError
from apportion.models.loading import load_classifier
from apportion.models.stored_head import head_of

KEY = "reward_mean"  # in config.json
IN_BIAS = "It is subtracted in the head's bias: R is the logit."
IN_CONFIG = (
    "The head has no bias: R is the logit less `reward_mean` of config.json. apportion subtracts it; with transformers "
    "alone, subtract it yourself."
)


def stored_mean(config: Any) -> float:
    """Return `reward_mean` of a model's settings, 0 without one. Raises ModelError for what is no finite number."""
    value = getattr(config, KEY, None)
    if value is None:
        return 0.0
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ModelError(KEY, value, "a finite number in config.json", "Remove it, or write the mean reward.")
    return float(value)


def subtract_mean(folder: Path, mean: float, over: str) -> str:
    """Subtract `mean` from the reward of the 1-label classifier in `folder`, and say so on its card.

    Args:
        over: what the mean is taken over, for the card.

    Returns:
        "bias" or "reward_mean": where it is subtracted.
    """
    model: Any = load_classifier("model", str(folder), torch.float32, torch.device("cpu"), fast_kernels=False)
    bias: Any = getattr(head_of(model), "bias", None)
    if bias is None:
        path = folder / "config.json"
        settings = json.loads(path.read_text(encoding="utf-8")) | {KEY: mean}
        path.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    else:
        with torch.no_grad():
            bias -= mean
        model.save_pretrained(folder)
    card = folder / "README.md"
    text = f"\n## Zero mean\n\nThe mean reward over {over} was {mean:.6g} after training. "
    card.write_text(
        card.read_text(encoding="utf-8") + text + (IN_CONFIG if bias is None else IN_BIAS) + "\n", encoding="utf-8"
    )
    return KEY if bias is None else "bias"
