"""`apportion reward`: train a reward model on labelled texts, preference pairs or rankings."""

from __future__ import annotations

import sys
from typing import Any

from apportion.cli.arguments import Parsed, parse, show
from apportion.cli.terminal import bar, interval, note
from apportion.cli.threads import configure_threads
from apportion.config import RewardConfig
from apportion.distributed import launcher
from apportion.training.publish.trackers import check_trackers

EXAMPLES = """examples:
  apportion reward                                  # IMDb on SmolLM2-135M
  apportion reward --data reviews.csv --model my/base --output runs/my-reward
  apportion reward --data pairs.jsonl.gz --model my/base --excerpt_tokens '[16, 128]'
  apportion reward --data rankings.jsonl --model my/sft --preferences.loss plackett_luce
  apportion reward --data pairs.parquet --model my/sft --preferences.whole true
  apportion reward --lora.rank 0 --optim.lr 2e-5    # all weights
"""
SHOWN = {"loss/reward": "loss", "accuracy": "accuracy", "time/total": "s"}


def run(arguments: list[str]) -> int:
    """Parse, train, evaluate, and print the run folder."""
    parsed = parse(RewardConfig, "reward", arguments, EXAMPLES)
    if parsed.dry_run:
        if launcher.is_log_rank():
            sys.stdout.write(show(parsed.config))
        return 0
    check_trackers(parsed.config.trackers)
    configure_threads(parsed.config, "" if parsed.fresh else "reward")
    finished = train(parsed)
    if not launcher.is_log_rank():
        return 0
    figures = finished.read("evaluation.json")
    beside = f", of length alone {interval(figures['length_only'], 3)}" if "length_only" in figures else ""
    note(f"held-out accuracy {interval(figures['accuracy'], 3)}{beside}, calibration error {figures['ece']:.3f}")
    sys.stdout.write(f"{finished.path}\n")
    return 0


def train(parsed: Parsed[RewardConfig], label: str = "reward model") -> Any:
    """Run the stage under a progress bar and return its run folder."""
    from apportion.stages.reward.train import train as train_reward

    total = -(-parsed.config.excerpts // parsed.config.batch_size)
    if not launcher.is_log_rank():  # one bar for all processes
        return train_reward(parsed.config, fresh=parsed.fresh)
    with bar(label, total, SHOWN) as progress:
        return train_reward(parsed.config, fresh=parsed.fresh, on_step=progress.on_step)
