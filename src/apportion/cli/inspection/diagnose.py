"""`apportion diagnose`: comparison of credit methods for a policy and a reward model, before any training."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from apportion.cli.arguments import parse, show
from apportion.cli.terminal import bar, note
from apportion.cli.threads import configure_threads
from apportion.compatibility import check_diagnosis
from apportion.config import DiagnoseConfig

EXAMPLES = """examples:
  apportion diagnose --reward_model runs/demo/reward/final
  apportion diagnose --reward_model my/reward --policy my/model --prompts prompts.jsonl --sampling.prompt_tokens null \\
      --sampling.stop eos --methods '[sparse, attention, {attention: {exclude_self: true}}, ma-ppo]' --json

Rows: `cosine` of the method's expected policy gradient with the true one; `bias`, the norm of their difference over the
true one's; `signal`, the norm of the expected gradient over the noise of one batch; `useful`, the same along the true
gradient; `stop bias`, what the method adds to the gradient of the EOS logit.
"""
ROWS = {  # title: (key, digits)
    "cosine": ("cosine", 2),
    "bias": ("bias", 2),
    "signal": ("snr", 3),
    "useful": ("useful_snr", 3),
    "stop bias": ("stop_bias", 3),
    "kept mass": ("credit/kept_mass", 2),
    "entropy": ("credit/share_entropy", 2),
    "r(length)": ("length_correlation", 2),
    "extra ms": ("extra_ms", 0),
    "forwards": ("extra_forwards", 0),
    "backwards": ("extra_backwards", 0),
}


def run(arguments: list[str]) -> int:
    """Parse, check, diagnose, and print a table or one JSON object."""
    as_json = "--json" in arguments
    parsed = parse(DiagnoseConfig, "diagnose", [a for a in arguments if a != "--json"], EXAMPLES)
    check(parsed.config)
    if parsed.dry_run:
        sys.stdout.write(show(parsed.config))
        return 0
    configure_threads(parsed.config)
    from apportion.stages.diagnose.diagnose import diagnose

    with bar("diagnose", parsed.config.count, {}) as progress:
        result = diagnose(
            parsed.config,
            fresh=parsed.fresh,
            on_progress=lambda done, count: progress.on_step(done, count, {}),
            warn=note,
        )
    if as_json:
        sys.stdout.write(json.dumps(result) + "\n")
    else:
        print_table(result)
    return 0


def check(config: DiagnoseConfig) -> None:
    """Raise ConfigError for incompatible settings, before anything is loaded."""
    from apportion.stages.diagnose.candidates import candidates

    check_diagnosis(config)
    candidates(config.methods, config.lam)


def print_table(result: Mapping[str, Any]) -> None:
    """Print a column a method, the verdicts and the recommendation."""
    methods = result["methods"]
    table = Table("", *methods)
    for title, (key, digits) in ROWS.items():
        table.add_row(title, *(cell(measured.get(key), digits) for measured in methods.values()))
    console = Console(markup=False, highlight=False, soft_wrap=True)
    if not console.is_terminal:  # no wrapping in a file
        console.width = 14 + 26 * len(methods)
    console.print(table)
    for name, measured in methods.items():
        console.print(f"{name}: {measured['verdict']}.")
    console.print(f"\n{result['recommended'] or 'nothing to recommend'}: {result['why']}")
    size = f"{result['rollouts']} rollouts of {result['prompts']} prompts, 95% intervals over prompts"
    console.print(f"({size}; signal for batches of {result['batch']})")


def cell(value: Any, digits: int) -> str:
    """Return a number or "mean [low, high]"; a dash for a figure that is not resolved or does not apply."""
    if not isinstance(value, Mapping):
        return "–" if value is None else f"{value:.{digits}f}"
    if value["mean"] is None:
        return "–"
    return f"{value['mean']:.{digits}f} [{value['low']:.{digits}f}, {value['high']:.{digits}f}]"
