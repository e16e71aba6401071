"""`apportion sample`: K answers to every prompt, with their log-probabilities."""

from __future__ import annotations

import sys

from apportion.cli.arguments import parse, show
from apportion.cli.terminal import bar, interval, note
from apportion.cli.threads import configure_threads
from apportion.config import SampleConfig

EXAMPLES = """examples:
  apportion sample --policy my/sft-model --prompts prompts.jsonl
  apportion sample --prompts prompts.jsonl --sampling.samples_per_prompt 8 --sampling.top_p 0.95
  apportion sample --prompts prompts.parquet --count 200 --format parquet
"""


def run(arguments: list[str]) -> int:
    """Parse, sample, and print the finished file."""
    parsed = parse(SampleConfig, "sample", arguments, EXAMPLES)
    if parsed.dry_run:
        sys.stdout.write(show(parsed.config))
        return 0
    configure_threads(parsed.config, "" if parsed.fresh else "sample")
    from apportion.stages.sample.sample import sample_answers
    from apportion.training.run_folder import RunFolder

    with bar("prompts", parsed.config.count or 1, {}) as progress:
        path = sample_answers(parsed.config, fresh=parsed.fresh, on_step=progress.on_step)
    figures = RunFolder(path.parent, "sample").read("evaluation.json")
    counts = f"{figures['completions']} answers to {figures['prompts']} prompts"
    note(f"{counts}, {interval(figures['length'], 1)} tokens each, {figures['ended']['mean']:.0%} ended by themselves")
    if figures["prompts_with_equal_answers"]:
        note(f"{figures['prompts_with_equal_answers']} prompts have two equal answers, which nobody can rank.")
    sys.stdout.write(f"{path}\n")
    return 0
