"""`apportion demo`: reward model, PPO with dense credit, an independent judge, and a page that shows it."""

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
    """Run the stages that are not finished yet, write report.html and summary.json, and print the latter's path."""
    parsed = parse(DemoConfig, "demo", arguments, EXAMPLES)
    reward, rl = stages(parsed.config)
    rl_command.check_method(rl)
    if parsed.dry_run:
        sys.stdout.write(show(parsed.config) + "---\n" + show(reward) + "---\n" + show(rl))
        return 0
    configure_threads(parsed.config)
    began = time.perf_counter()
    with PeakMemory() as memory:
        reward_run, rl_run, found = train(parsed, reward, rl)
        report = write_report(parsed.config, reward_run, rl_run)
    path = write_summary(parsed.config, reward_run, rl_run, found, report, time.perf_counter() - began, memory.peak_mb)
    sys.stdout.write(evaluation_lines(found))
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
        # two epochs, not four: the KL budget is spent before more passes over a batch pay for their time
        ppo=PPOConfig(epochs=2),
        optim=OptimConfig(lr=config.lr),
    )
    return reward, rl


def rl_folder(config: DemoConfig) -> str:
    """Return the folder of the PPO stage: one for each credit and number of steps, so that they can be compared."""
    parts = ["rl", re.sub(r"[^\w.]+", "-", str(config.credit)).strip("-")]
    return "-".join([*parts, str(config.steps)] if config.steps != DemoConfig.steps else parts)


def train(parsed: Parsed, reward: RewardConfig, rl: RLConfig) -> tuple[RunFolder, RunFolder, dict[str, Any]]:
    """Run reward model, PPO and evaluation, each only if it is not finished; return their runs and the figures."""
    from apportion.stages.evaluate.evaluate import evaluate

    reward_run = reward_command.train(Parsed(reward, parsed.fresh, False), "1/3 reward model")
    accuracy = reward_run.read("evaluation.json")["accuracy"]
    note(f"reward model: held-out accuracy {interval(accuracy, 3)} on excerpts of {reward.excerpt_tokens} tokens")
    rl_run = rl_command.train(Parsed(rl, parsed.fresh, False), "2/3 PPO")
    found = rl_run.read("evaluation.json")
    asked = EvaluateConfig(
        run=str(rl_run.path), count=parsed.config.count, seed=parsed.config.seed + 1, threads=parsed.config.threads
    )
    if found.get("prompts") != asked.count or found.get("seed") != asked.seed:
        found = evaluate(asked, tell=lambda line: note(f"3/3 evaluation: {line}"))
    return reward_run, rl_run, found


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
    found: dict[str, Any],
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
            **{key: found[key] for key in pairs},
            "kl": found["kl"]["mean"],  # nats a sequence
            "kl_interval": found["kl"],
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
