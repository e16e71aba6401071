"""`apportion evaluate`: compare policies on the same prompts, or one trained policy with its start."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from apportion.cli.arguments import Parsed, parse, show
from apportion.cli.terminal import bar, interval, note
from apportion.cli.threads import configure_threads
from apportion.config import EvaluateConfig
from apportion.config.evaluate import compares

EXAMPLES = """examples:
  apportion evaluate --run runs/rl
  apportion evaluate --run runs/rl --prompts my-prompts.jsonl --judge false
  apportion evaluate --policies runs/ppo runs/dpo --start runs/sft --prompts held-out.jsonl --judges runs/reward/final
  apportion evaluate --policies runs/a runs/b runs/c --against all --judges my_judges:helpful --bucket topic
"""


def run(arguments: list[str]) -> int:
    """Parse, evaluate, and print the figures."""
    parsed = parse(EvaluateConfig, "evaluate", arguments, EXAMPLES)
    several = compares(parsed.config)
    if parsed.dry_run:
        sys.stdout.write(show(parsed.config))
        return 0
    if several:
        return _compare(parsed)
    configure_threads(parsed.config)
    from apportion.stages.evaluate.evaluate import evaluate

    figures = evaluate(parsed.config, on_progress=note)
    sys.stdout.write(summary(figures))
    return 0


def _compare(parsed: Parsed[EvaluateConfig]) -> int:
    """Compare the policies, draw the page, and print the table and the page's path."""
    config = parsed.config
    configure_threads(config, "" if parsed.fresh else "evaluate")
    from apportion.report.comparison.page import write_comparison
    from apportion.report.comparison.text import comparison_table
    from apportion.stages.evaluate.comparison.compare import compare

    with ExitStack() as shown:
        progress = shown.enter_context(bar("answered prompts", config.count, {}, doing="comparing"))

        def begin(line: str) -> None:
            shown.close()  # the bar is of the sampling alone
            note(line)

        figures = compare(config, fresh=parsed.fresh, on_step=progress.on_step, on_progress=begin)
    page = write_comparison(Path(config.output).expanduser())
    sys.stdout.write(comparison_table(figures) + f"{page}\n")
    return 0


def summary(figures: dict[str, Any]) -> str:
    """Return the measured figures of one run as a few lines of text."""
    lines = [f"reward      {interval(figures['reward_before'])} -> {interval(figures['reward_after'])}"]
    if "judge_before" in figures:
        lines.append(f"judge       {interval(figures['judge_before'])} -> {interval(figures['judge_after'])}")
    lines += [
        f"KL          {interval(figures['kl'], 1)} nats a sequence",
        f"distinct-2  {figures['distinct2_before']:.3f} -> {figures['distinct2_after']:.3f}",
        f"perplexity  {figures['perplexity_before']:.1f} -> {figures['perplexity_after']:.1f} under the start",
    ]
    return "\n".join(lines) + f"\n({figures['prompts']} fresh prompts, 95% intervals)\n"
