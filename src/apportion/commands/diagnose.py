"""`apportion diagnose`: which credit suits this policy and this reward model, before any training."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from apportion.commands.settings import parse, show
from apportion.commands.terminal import bar
from apportion.config import DiagnoseConfig
from apportion.errors import ConfigError, message

EXAMPLES = """examples:
  apportion diagnose --reward_model runs/demo/reward/final
  apportion diagnose --reward_model my/reward --policy my/model --prompts prompts.jsonl --sampling.prompt_tokens null \\
      --sampling.stop eos --methods '[sparse, attention, {attention: {exclude_self: true}}, ma-ppo]' --json

What the columns mean: `cosine` of the method's expected policy gradient with the true one; `bias`, the length of their
difference over the true one's; `signal`, the length of the expected gradient over the noise of one batch; `useful`, the
same along the true gradient; `stop bias`, what it adds to the gradient of the EOS logit.
"""
COLUMNS = ("method", "cosine", "bias", "signal", "useful", "stop bias", "kept", "entropy", "r(length)", "ms", "passes")


def run(arguments: list[str]) -> int:
    """Parse, check, diagnose, and print a table or one JSON object."""
    as_json = "--json" in arguments
    parsed = parse(DiagnoseConfig, "diagnose", [a for a in arguments if a != "--json"], EXAMPLES)
    check(parsed.config)
    if parsed.dry_run:
        sys.stdout.write(show(parsed.config))
        return 0
    from apportion.stages.diagnose import diagnose

    with bar("diagnose", parsed.config.count, {}) as progress:
        found = diagnose(parsed.config, fresh=parsed.fresh, tell=lambda done, count: progress.tell(done, {}, count))
    if as_json:
        sys.stdout.write(json.dumps(found) + "\n")
    else:
        print_table(found)
    return 0


def check(config: DiagnoseConfig) -> None:
    """Raise ConfigError for settings that do not go together, before anything is loaded."""
    from apportion.stages.contenders import contenders

    if config.count < 2:
        raise ConfigError(message("count", config.count, "at least 2: intervals are over prompts", "Set it to 64."))
    if config.sampling.samples_per_prompt is not None:
        came = config.sampling.samples_per_prompt
        raise ConfigError(message("sampling.samples_per_prompt", came, "null", "Use --samples here."))
    contenders(config.methods, config.lam)


def print_table(found: Mapping[str, Any]) -> None:
    """Print a row a method, the verdicts and the recommendation."""
    console = Console(markup=False, highlight=False)
    table = Table(*COLUMNS)
    for name, measured in found["methods"].items():
        table.add_row(name, *cells(measured))
    console.print(table)
    for name, measured in found["methods"].items():
        console.print(f"{name}: {measured['verdict']}.", soft_wrap=True)
    console.print(f"\n{found['recommended'] or 'nothing to recommend'}: {found['why']}", soft_wrap=True)
    size = f"{found['rollouts']} rollouts of {found['prompts']} prompts, 95% intervals over prompts"
    console.print(f"({size}; signal for batches of {found['batch']})", soft_wrap=True)


def cells(measured: Mapping[str, Any]) -> list[str]:
    """Return the table's cells of one method after its name."""
    first = [ranged(measured[key]) for key in ("cosine", "bias", "snr", "useful_snr", "stop_bias")]
    rest = [plain(measured.get(key), 2) for key in ("credit/kept_mass", "credit/share_entropy", "length_correlation")]
    passes = f"{measured['extra_forwards']:.0f}+{measured['extra_backwards']:.0f}"
    return [*first, *rest, plain(measured["extra_ms"], 0), passes]


def ranged(value: Mapping[str, float | None] | None) -> str:
    """Return "mean [low, high]", or a dash for what was not resolved or does not apply."""
    if value is None or value["mean"] is None:
        return "–"
    return f"{value['mean']:.2f} [{value['low']:.2f}, {value['high']:.2f}]"


def plain(value: float | None, digits: int) -> str:
    """Return a number, or a dash for none."""
    return "–" if value is None else f"{value:.{digits}f}"
