"""`apportion rl`: train a policy with its reward apportioned over the tokens."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from apportion.cli.arguments import Parsed, parse, show
from apportion.cli.terminal import bar, note
from apportion.cli.threads import configure_threads
from apportion.config import RLConfig
from apportion.distributed import launcher
from apportion.training.publish.trackers import check_trackers

if TYPE_CHECKING:  # needs torch, which the help does not
    from apportion.types import Method

EXAMPLES = """examples:
  apportion rl --reward_model runs/reward/final --steps 40
  apportion rl --reward_model runs/reward/final --credit uniform --output runs/uniform
  apportion rl --reward_model my/reward --policy my/model --prompts prompts.jsonl --sampling.prompt_tokens null \\
      --sampling.stop eos --sampling.max_new_tokens 128 --credit attention --credit.mix 0.5
"""
SHOWN = {"objective/scores": "reward", "objective/kl": "KL", "objective/entropy": "entropy", "time/total": "s"}


def run(arguments: list[str]) -> int:
    """Parse, check, train, and print the run folder. Configuration errors come before any model library is loaded."""
    parsed = parse(RLConfig, "rl", arguments, EXAMPLES)
    check_method(parsed.config)
    if parsed.dry_run:
        if launcher.is_log_rank():
            sys.stdout.write(show(parsed.config))
        return 0
    check_trackers(parsed.config.trackers)
    configure_threads(parsed.config, "" if parsed.fresh else "rl")
    finished = train(parsed)
    if launcher.is_log_rank():
        sys.stdout.write(f"{finished.path}\n")
    return 0


def check_method(config: RLConfig) -> Method:
    """Return the run's method; warn when γ < 1 meets a redistributing credit. Raises ConfigError."""
    from apportion.compatibility import discount_warning
    from apportion.stages.method import build_method

    method = build_method(config)
    warning = discount_warning(method)
    if warning is not None and launcher.is_log_rank():
        note(f"warning: {warning}")
    return method


def train(parsed: Parsed[RLConfig], label: str = "rl") -> Any:
    """Run the stage under a progress bar and return its run folder."""
    from apportion.stages.rl.train import train as train_rl

    if not launcher.is_log_rank():  # one bar for all processes
        return train_rl(parsed.config, fresh=parsed.fresh)
    with bar(label, parsed.config.steps, SHOWN) as progress:
        return train_rl(parsed.config, fresh=parsed.fresh, on_step=progress.on_step, warn=note)
