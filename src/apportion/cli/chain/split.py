"""`apportion split`: people's rankings split by prompt into what is trained on and what is held out."""

from __future__ import annotations

import sys

from apportion.cli.arguments import parse, show
from apportion.cli.terminal import note
from apportion.config.chain.split import SplitConfig

EXAMPLES = """examples:
  apportion split --data rankings.jsonl
  apportion split --data '[rankings.jsonl, pairs.jsonl]' --held_out 150 --longest_prompt 600
  apportion split --data Anthropic/hh-rlhf --dialogues true --count 4000
"""


def run(arguments: list[str]) -> int:
    """Parse, split, and print the run folder."""
    parsed = parse(SplitConfig, "split", arguments, EXAMPLES)
    if parsed.dry_run:
        sys.stdout.write(show(parsed.config))
        return 0
    from apportion.stages.split.split import split_rankings

    finished = split_rankings(parsed.config, fresh=parsed.fresh)
    counts = finished.read("evaluation.json")
    note(f"to train on: {counts['rankings']} rankings of {counts['prompts']} prompts")
    note(f"held out: {counts['held_out_rankings']} rankings of {counts['held_out_prompts']} prompts")
    sys.stdout.write(f"{finished.path}\n")
    return 0
