"""`apportion demo`: a reward model, PPO with dense credit, an independent judge, and a report page."""

from __future__ import annotations

import re
import sys
import time
from pathlib import Path
from typing import Any

from apportion.cli import reward as reward_command
from apportion.cli import rl as rl_command
from apportion.cli.arguments import Parsed, parse, show
from apportion.cli.evaluate import summary as evaluation_lines
from apportion.cli.terminal import interval, note
from apportion.cli.threads import configure_threads
from apportion.config import DemoConfig, EvaluateConfig, OptimConfig, PPOConfig, RewardConfig, RLConfig
from apportion.system.memory import PeakMemory
from apportion.training.run_folder import RunFolder

EXAMPLES = """examples:
  apportion demo
  apportion demo --credit uniform --output runs/demo-uniform
  apportion demo --steps 100 --fresh
"""


def run(arguments: list[str]) -> int:
    """Run the stages that are not finished, write report.html and summary.json, and print the path of the latter."""
    parsed = parse(DemoConfig, "demo", arguments, EXAMPLES)
    reward, rl = stages(parsed.config)
    rl_command.check_method(rl)
    if parsed.dry_run:
        sys.stdout.write(show(parsed.config) + "---\n" + show(reward) + "---\n" + show(rl))
        return 0
    configure_threads(parsed.config)
    start = time.perf_counter()
    with PeakMemory() as memory:
        reward_run, rl_run, figures = train(parsed, reward, rl)
        report = write_report(parsed.config, reward_run, rl_run)
    path = write_summary(
        parsed.config, reward_run, rl_run, figures, report, time.perf_counter() - start, memory.peak_mb
    )
    sys.stdout.write(evaluation_lines(figures))
    sys.stdout.write(f"report: {report}\n{path}\n")
    return 0


def stages(config: DemoConfig) -> tuple[RewardConfig, RLConfig]:
    """Return the settings of the two training stages: extrapolated from runs on validation prompts (LOG.md)."""
    root = Path(config.output).expanduser()
    reward = RewardConfig(
        output=str(root / "reward"), excerpts=config.excerpts, seed=config.seed, threads=config.threads
    )
    rl = RLConfig(
        reward_model=str(root / "reward" / "final"),
        output=str(root / rl_folder(config)),
        credit=config.credit,
        steps=config.steps,
        seed=config.seed,
        threads=config.threads,
        # two epochs, not four: the KL budget is used up before more passes over a batch are worth their time
        ppo=PPOConfig(epochs=2),
        optim=OptimConfig(lr=config.lr),
    )
    return reward, rl


def rl_folder(config: DemoConfig) -> str:
    """Return the folder of the PPO stage: one for each credit and number of steps."""
    parts = ["rl", re.sub(r"[^\w.]+", "-", str(config.credit)).strip("-")]
    return "-".join([*parts, str(config.steps)] if config.steps != DemoConfig().steps else parts)


def train(
    parsed: Parsed[DemoConfig], reward: RewardConfig, rl: RLConfig
) -> tuple[RunFolder, RunFolder, dict[str, Any]]:
    """Run reward model, PPO and evaluation, each if it is not finished; return their runs and the figures."""
    from apportion.stages.evaluate.evaluate import evaluate

    reward_run = reward_command.train(Parsed(reward, parsed.fresh, False), "1/3 reward model")
    accuracy = reward_run.read("evaluation.json")["accuracy"]
    note(f"reward model: held-out accuracy {interval(accuracy, 3)} on excerpts of {reward.excerpt_tokens} tokens")
    rl_run = rl_command.train(Parsed(rl, parsed.fresh, False), "2/3 PPO")
    figures = rl_run.read("evaluation.json")
    wanted = EvaluateConfig(
        run=str(rl_run.path), count=parsed.config.count, seed=parsed.config.seed + 1, threads=parsed.config.threads
    )
    if figures.get("prompts") != wanted.count or figures.get("seed") != wanted.seed:
        figures = evaluate(wanted, on_progress=lambda line: note(f"3/3 evaluation: {line}"))
    return reward_run, rl_run, figures


def write_report(config: DemoConfig, reward_run: RunFolder, rl_run: RunFolder) -> Path:
    """Write the page of this run, the reward model and the folder's other finished PPO runs; return its path."""
    from apportion.report.page import write_report as write_page

    root = Path(config.output).expanduser()
    others = [p for p in sorted(root.glob("rl-*")) if p != rl_run.path and RunFolder(p, "rl").finished]
    return write_page([rl_run.path, *others, reward_run.path], root / "report.html")


def write_summary(
    config: DemoConfig,
    reward_run: RunFolder,
    rl_run: RunFolder,
    figures: dict[str, Any],
    report: Path,
    seconds: float,
    peak: float,
) -> Path:
    """Write summary.json beside the report and return its path."""
    folder = RunFolder(report.parent, "demo")
    measures = ("reward", "judge", "distinct2", "perplexity")
    pairs = [f"{name}_{when}" for name in measures for when in ("before", "after")]
    folder.write_json(
        "summary.json",
        {
            "reward_model_accuracy": reward_run.read("evaluation.json")["accuracy"],
            **{key: figures[key] for key in pairs},
            "kl": figures["kl"]["mean"],  # nats a sequence
            "kl_interval": figures["kl"],
            "credit": config.credit,
            "steps": config.steps,
            "seed": config.seed,
            "seconds": round(seconds, 1),
            "peak_rss_mb": round(peak),
            "policy": str(rl_run.path / "final"),
            "reward_model": str(reward_run.path / "final"),
            "prompts": str(rl_run.path / "prompts.jsonl"),
            "samples": str(rl_run.path / "samples.jsonl"),
            "report": str(report),
        },
    )
    return folder.path / "summary.json"
