"""The trained reward model: saved with its card, its mean subtracted, evaluated on what was held out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from apportion.config import RewardConfig, to_dict
from apportion.models.reward import STATISTICS, load_reward
from apportion.models.reward.mean import subtract_mean
from apportion.models.saving import model_card, save_classifier
from apportion.stages.reward.card import reward_card
from apportion.stages.reward.evaluation import evaluate
from apportion.stages.reward.inputs import Inputs
from apportion.stages.reward.learner import RewardLearner
from apportion.stages.reward.ranked_evaluation import evaluate_rankings, mean_reward
from apportion.system.progress import activity
from apportion.training.publish.card import write_card
from apportion.training.run_folder import RunFolder
from apportion.training.session import saved_bytes


def save_reward(model: Any, config: RewardConfig, given: Inputs, folder: Path) -> None:
    """Write the model to `folder`."""
    first = reward_card(config, given, {})
    card = model_card(first.title, first.tag, f"{first.summary} {first.method}", to_dict(config))
    labels, lora = 1 if given.ranked else 2, config.lora.rank > 0
    save_classifier(model, given.tokenizer, given.folder, folder, card, lora=lora, labels=labels)


def evaluate_final(
    learner: RewardLearner, run: RunFolder, config: RewardConfig, given: Inputs, folder: Path
) -> dict[str, Any]:
    """Return the evaluation of the model in `folder`, its mean subtracted; write its mean, sd and card there."""
    learner.release()
    centred = _centre(run, config, given, folder) if given.ranked and config.preferences.zero_mean else {}
    with activity("evaluating"):
        if given.ranked:
            evaluation = evaluate_rankings(folder, given.test_rows, config) | centred
        else:
            evaluation = evaluate(folder, given.test_rows, config)
    statistics = json.dumps({"mean": evaluation["score_mean"], "sd": evaluation["score_sd"]})
    run.retry_when_full(lambda: (folder / STATISTICS).write_text(statistics), len(statistics))
    card = reward_card(config, given, evaluation)
    run.retry_when_full(lambda: write_card(folder, card, config.model, to_dict(config)), 1 << 16)
    return evaluation


def _centre(run: RunFolder, config: RewardConfig, given: Inputs, folder: Path) -> dict[str, Any]:
    """Subtract the mean reward from the model in `folder`, in float32; return the mean, and where it is subtracted."""
    with activity("zero mean"):
        reward = load_reward(str(folder), device=config.device, fast_kernels=config.fast_kernels, field="model")
        mean, size = mean_reward(reward, given.centred), saved_bytes(reward.model)
        del reward
    place = ""

    def write() -> None:
        nonlocal place
        place = subtract_mean(folder, mean, given.over)

    run.retry_when_full(write, size)
    return {"subtracted_mean": mean, "subtracted_in": place, "subtracted_over": given.over}
