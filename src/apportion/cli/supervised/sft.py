"""`apportion sft`: fine-tune a model on demonstrations."""

from __future__ import annotations

import sys
from typing import Any

from apportion.cli.arguments import Parsed, parse, show
from apportion.cli.terminal import bar, interval, note
from apportion.cli.threads import configure_threads
from apportion.config import SFTConfig
from apportion.distributed import launcher
from apportion.training.publish.trackers import check_trackers

EXAMPLES = """rows of --data, the first form that the table has:
  {"text": "..."}                                           every token is learned
  {"messages": [{"role": "user", "content": "..."}, ...]}   the assistant's turns are
  {"prompt": "...", "completion": "..."}                    the completion is; or both as lists of messages

Every target ends with an end token. runs/sft/final is a model for transformers, and for `apportion rl --policy`.

examples:
  apportion sft                                          # IMDb reviews on SmolLM2-135M
  apportion sft --data demonstrations.jsonl --model my/base --epochs 2
  apportion sft --data chats.parquet --packing true --micro_batch 1 --max_length 2048
  apportion sft --data demonstrations.jsonl --lora.rank 0 --optim.lr 2e-5    # all weights
"""
SHOWN = {"loss/sft": "loss", "accuracy/tokens": "token accuracy", "time/total": "s"}


def run(arguments: list[str]) -> int:
    """Parse, train, evaluate, and print the run folder."""
    parsed = parse(SFTConfig, "sft", arguments, EXAMPLES)
    if parsed.dry_run:
        if launcher.is_log_rank():
            sys.stdout.write(show(parsed.config))
        return 0
    check_trackers(parsed.config.trackers)
    configure_threads(parsed.config, "" if parsed.fresh else "sft")
    finished = train(parsed)
    figures = finished.read("evaluation.json")
    if figures.get("rows"):
        before, after = (interval(figures[f"nll_{name}"], 3) for name in ("before", "after"))
        note(f"held-out loss, nats a token: {before} before, {after} after")
    sys.stdout.write(f"{finished.path}\n")
    return 0


def train(parsed: Parsed[SFTConfig], label: str = "sft") -> Any:
    """Run the stage under a progress bar and return its run folder."""
    from apportion.stages.sft.train import train as train_sft

    with bar(label, parsed.config.steps or 1, SHOWN) as progress:
        return train_sft(parsed.config, fresh=parsed.fresh, on_step=progress.on_step)
