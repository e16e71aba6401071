"""Card of a policy that was trained by reinforcement learning."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from apportion.config import RLConfig, reward_specs
from apportion.intervals import mean_interval
from apportion.training.publish.card import Card, Row, without_folders
from apportion.training.publish.sources import Use
from apportion.training.run_folder import RunFolder

MEASURES = {
    "objective/scores": "reward",
    "objective/kl": "KL from the start, nats a response",
    "objective/entropy": "entropy, nats a token",
    "objective/length": "length, tokens",
}
SHARE, MOST = 10, 20  # of the batches a tenth at either end is averaged, at most so many


def rl_card(config: RLConfig, run: RunFolder, specs: Mapping[str, Any], prompts: int) -> Card:
    """Return the card of a run's final policy, with numbers of its metrics.jsonl.

    Args:
        specs: the method as it was resolved. prompts: how many it was trained on.
    """
    count, rows = results(metrics_of(run))
    sampling = config.sampling
    parts = {name: json.dumps(without_folders(value), ensure_ascii=False) for name, value in specs.items()}
    rewards = [str(without_folders(spec.source)) for spec in reward_specs(config.reward_model, config.rewards)]
    sampled = f"{config.steps * sampling.batch_size} responses to {prompts} prompts"
    return Card(
        title="Policy",
        tag="reinforcement-learning",
        summary="A policy trained by reinforcement learning against a reward, its score apportioned over the tokens.",
        method="\n".join(
            (
                f"Algorithm `{config.algorithm}`, {config.steps} batches of {sampling.batch_size} responses of up to "
                f"{sampling.max_new_tokens} tokens; reward: {', '.join(f'`{one}`' for one in rewards)}.",
                "",
                *(f"- {name}: `{text}`" for name, text in parts.items()),
            )
        ),
        data=[Use("training prompts", config.prompts, config.split, sampled)],
        results=rows,
        measured=f"Means over the first and the last {count} batches, on training prompts; the intervals are normal, "
        "over batches. `apportion evaluate` compares it with its start on prompts that it has not seen.",
        limits=(
            "A reward that rises is what training does: it says nothing of what the reward model was not right about.",
            "The numbers are of training prompts, and of the temperature and the lengths in the settings.",
            "Nobody checked what it generates: it may be wrong, offensive or unsafe, as its base model is.",
        ),
    )


def results(metrics: Sequence[Mapping[str, float]]) -> tuple[int, list[Row]]:
    """Return (number of batches at either end, rows of their means with intervals over batches)."""
    count = max(1, min(MOST, len(metrics) // SHARE))
    rows = []
    for key, words in MEASURES.items():
        for when, part in (("at the start", metrics[:count]), ("at the end", metrics[-count:])):
            values = [row[key] for row in part if key in row]
            if values:
                rows.append(Row(f"{words}, {when}", mean_interval(values) if len(values) > 1 else values[0]))
    return count, rows


def metrics_of(run: RunFolder) -> list[dict[str, float]]:
    """Return the lines of metrics.jsonl."""
    path = run.path / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []
