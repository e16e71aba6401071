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
    """Parse, evaluate, print what was measured."""
    parsed = parse(EvaluateConfig, "evaluate", arguments, EXAMPLES)
    if parsed.dry_run:
        sys.stdout.write(show(parsed.config))
        return 0
    configure_threads(parsed.config)
    from apportion.stages.evaluate.evaluate import evaluate

    found = evaluate(parsed.config, tell=note)
    sys.stdout.write(summary(found))
    return 0


def summary(found: dict[str, Any]) -> str:
    """Return the measured figures as a few lines of text."""
    lines = [f"reward      {interval(found['reward_before'])} -> {interval(found['reward_after'])}"]
    if "judge_before" in found:
        lines.append(f"judge       {interval(found['judge_before'])} -> {interval(found['judge_after'])}")
    lines += [
        f"KL          {interval(found['kl'], 1)} nats a sequence",
        f"distinct-2  {found['distinct2_before']:.3f} -> {found['distinct2_after']:.3f}",
        f"perplexity  {found['perplexity_before']:.1f} -> {found['perplexity_after']:.1f} under the start",
    ]
    return "\n".join(lines) + f"\n({found['prompts']} fresh prompts, 95% intervals)\n"
