"""`apportion dpo`: train a policy on preference pairs by direct preference optimisation."""

from __future__ import annotations

import sys
from typing import Any

from apportion.cli.arguments import Parsed, parse, show
from apportion.cli.terminal import bar, interval, note
from apportion.cli.threads import configure_threads
from apportion.config import DPOConfig
from apportion.distributed import launcher
from apportion.training.publish.trackers import check_trackers

EXAMPLES = """rows of --data:
  {"prompt": "...", "chosen": "...", "rejected": "..."}               text, or lists of messages
  {"chosen": [...], "rejected": [...]}                                whole conversations that differ in the last turn
  {"prompt": "...", "completions": ["...", ...], "ranks": [1, 3, 2]}  a ranking, 1 is best

The reference is the model it starts from. runs/dpo/final is a model for `apportion evaluate` and transformers.

examples:
  apportion dpo --data pairs.jsonl --model runs/sft/final
  apportion dpo --data rankings.jsonl --model runs/sft/final --ranking_pairs best_worst
  apportion dpo --data pairs.jsonl --loss ipo --beta 0.1
  apportion dpo --data pairs.jsonl --lora.rank 0 --optim.lr 1e-6    # all weights
"""
SHOWN = {"loss/dpo": "loss", "accuracy/pairs": "accuracy", "rewards/margins": "margin", "time/total": "s"}


def run(arguments: list[str]) -> int:
    """Parse, check, train, evaluate, and print the run folder."""
    parsed = parse(DPOConfig, "dpo", arguments, EXAMPLES)
    if parsed.dry_run:
        if launcher.is_log_rank():
            sys.stdout.write(show(parsed.config))
        return 0
    check_trackers(parsed.config.trackers)
    configure_threads(parsed.config, "" if parsed.fresh else "dpo")
    finished = train(parsed)
    figures = finished.read("evaluation.json")
    if figures.get("pairs"):
        accuracy, margin = interval(figures["accuracy"], 3), interval(figures["margin"], 3)
        note(f"held-out pairs: accuracy {accuracy}, margin {margin} nats")
    sys.stdout.write(f"{finished.path}\n")
    return 0


def train(parsed: Parsed[DPOConfig], label: str = "dpo") -> Any:
    """Run the stage under a progress bar and return its run folder."""
    from apportion.stages.dpo.train import train as train_dpo

    with bar(label, parsed.config.steps or 1, SHOWN) as progress:
        return train_dpo(parsed.config, fresh=parsed.fresh, on_step=progress.on_step)
