"""`apportion evaluate`: compare a trained policy with its start on fresh prompts."""

from __future__ import annotations

import sys
from typing import Any

from apportion.cli.arguments import parse, show
from apportion.cli.terminal import interval, note
from apportion.cli.threads import configure_threads
from apportion.config import EvaluateConfig

EXAMPLES = """examples:
  apportion evaluate --run runs/rl
  apportion evaluate --run runs/rl --prompts my-prompts.jsonl --judge false
"""


def run(arguments: list[str]) -> int:
    """Parse, evaluate, and print the figures."""
    parsed = parse(EvaluateConfig, "evaluate", arguments, EXAMPLES)
    if parsed.dry_run:
        sys.stdout.write(show(parsed.config))
        return 0
    configure_threads(parsed.config)
    from apportion.stages.evaluate.evaluate import evaluate

    figures = evaluate(parsed.config, on_progress=note)
    sys.stdout.write(summary(figures))
    return 0


def summary(figures: dict[str, Any]) -> str:
    """Return the measured figures as a few lines of text."""
    lines = [f"reward      {interval(figures['reward_before'])} -> {interval(figures['reward_after'])}"]
    if "judge_before" in figures:
        lines.append(f"judge       {interval(figures['judge_before'])} -> {interval(figures['judge_after'])}")
    lines += [
        f"KL          {interval(figures['kl'], 1)} nats a sequence",
        f"distinct-2  {figures['distinct2_before']:.3f} -> {figures['distinct2_after']:.3f}",
        f"perplexity  {figures['perplexity_before']:.1f} -> {figures['perplexity_after']:.1f} under the start",
    ]
    return "\n".join(lines) + f"\n({figures['prompts']} fresh prompts, 95% intervals)\n"
