"""`apportion demo`: a reward model, PPO with dense credit, an independent judge, and a report page."""

from __future__ import annotations

import re
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

from apportion.cli import reward as reward_command
from apportion.cli import rl as rl_command
from apportion.cli.arguments import Parsed, parse, show
from apportion.cli.evaluate import summary as evaluation_lines
from apportion.cli.rl import check_method
from apportion.cli.terminal import interval, note
from apportion.cli.threads import configure_threads
from apportion.config import (
    DemoConfig,
    EvaluateConfig,
    OptimConfig,
    PPOConfig,
    RewardConfig,
    RLConfig,
    SamplingConfig,
)
from apportion.stages.demo.cost import Amounts
from apportion.stages.demo.plan import EVALUATION, FETCH, PAGE, POLICY, REWARD, Plan
from apportion.stages.demo.table import describe, table
from apportion.system.memory import PeakMemory
from apportion.system.progress import activity, running
from apportion.system.schedule import Part, Schedule
from apportion.training.publish.trackers import check_trackers
from apportion.training.run_folder import RunFolder

EXAMPLES = """examples:
  apportion demo --dry-run                       # what it will do on this machine, and for how long
  apportion demo
  apportion demo --minutes 30
  apportion demo --credit uniform --output runs/demo-uniform
  apportion demo --steps 100 --fresh
"""


def run(arguments: list[str]) -> int:
    """Plan, run the stages that are not finished, write report.html and summary.json, and print the latter's path."""
    parsed = parse(DemoConfig, "demo", arguments, EXAMPLES)
    config = parsed.config
    check_method(stages(config, Amounts(1, 1)).rl)
    check_trackers(config.trackers)
    with activity("starting"):
        threads = configure_threads(config)
        from apportion.stages.demo.folder import plan_demo  # loads torch

        plan = plan_demo(config, rl_folder(config), fresh=parsed.fresh)
    chosen = stages(config, plan.amounts)
    if parsed.dry_run:
        sys.stdout.write("---\n".join(map(show, (resolved(config, plan), *chosen))))
        sys.stdout.flush()
    note(describe(plan, threads.count))
    if parsed.dry_run:
        return 0
    start = time.perf_counter()
    with PeakMemory() as memory:
        taken, reward_run, rl_run, figures = run_plan(plan, config, chosen, fresh=parsed.fresh)
    report = Path(config.output).expanduser() / "report.html"
    seconds = time.perf_counter() - start
    path = write_summary(config, plan, reward_run, rl_run, figures, report, seconds, memory.peak_mb)
    note("\n".join(["", *table(plan, taken), ""]))
    sys.stdout.write(evaluation_lines(figures))
    sys.stdout.write(f"report: {report}\n{path}\n")
    return 0


class Stages(NamedTuple):
    """The settings of the demo's stages."""

    reward: RewardConfig
    rl: RLConfig
    evaluation: EvaluateConfig


def stages(config: DemoConfig, amounts: Amounts) -> Stages:
    """Return the settings of the stages for `amounts`: extrapolated from runs on validation prompts (LOG.md)."""
    root, rl_output = Path(config.output).expanduser(), str(rl_folder(config))
    shared: dict[str, Any] = {"threads": config.threads, "dtype": config.dtype}
    tracked = shared | {"trackers": config.trackers}
    reward = RewardConfig(
        output=str(root / "reward"),
        excerpts=amounts.excerpts,
        batch_size=amounts.batch,
        probe_excerpts=amounts.probe,
        test_texts=amounts.texts,
        seed=config.seed,
        **tracked,
    )
    rl = RLConfig(
        reward_model=str(root / "reward" / "final"),
        output=rl_output,
        credit=config.credit,
        steps=amounts.steps,
        seed=config.seed,
        sampling=SamplingConfig(batch_size=amounts.rows),
        # two epochs, not four: the KL budget is used up before more passes over a batch are worth their time
        ppo=PPOConfig(epochs=amounts.epochs),
        optim=OptimConfig(lr=config.lr),
        **tracked,
    )
    evaluation = EvaluateConfig(run=rl_output, count=amounts.prompts, seed=config.seed + 1, **shared)
    return Stages(reward, rl, evaluation)


def resolved(config: DemoConfig, plan: Plan) -> DemoConfig:
    """Return the settings with the plan's amounts in the place of null."""
    chosen = {"excerpts": plan.amounts.excerpts, "steps": plan.amounts.steps, "minutes": plan.minutes}
    return config.model_copy(update=chosen)


def rl_folder(config: DemoConfig) -> Path:
    """Return the folder of the PPO stage: one for each credit, and for each number of steps that is set."""
    parts = ["rl", re.sub(r"[^\w.]+", "-", str(config.credit)).strip("-")]
    return Path(config.output).expanduser() / "-".join([*parts, *([] if config.steps is None else [str(config.steps)])])


def run_plan(
    plan: Plan, config: DemoConfig, chosen: Stages, *, fresh: bool = False
) -> tuple[dict[Part, float | None], RunFolder, RunFolder, dict[str, Any]]:
    """Run the parts of the plan; return the seconds that each took, both runs, and the figures of the evaluation.

    plan.json is written before, so that a demo that is interrupted keeps its amounts, and after.
    """
    from apportion.stages.demo.folder import fetch, store

    store(plan, config, {})
    taken: dict[Part, float | None] = {}
    for line in plan.lines:
        if line.part.stage == FETCH:
            with activity(FETCH) as entry:
                fetch()
            taken[line.part] = entry.seconds
    schedule = Schedule("demo", plan.parts)
    with running(schedule):
        reward_run, rl_run, figures = train(chosen, fresh=fresh)
        with activity(PAGE):
            write_report(config, reward_run, rl_run)
    taken |= dict(zip(schedule.parts, schedule.taken, strict=True))
    store(plan, config, taken)
    return taken, reward_run, rl_run, figures


def train(chosen: Stages, *, fresh: bool = False) -> tuple[RunFolder, RunFolder, dict[str, Any]]:
    """Run reward model, PPO and evaluation, each if it is not finished; return their runs and the figures."""
    from apportion.stages.evaluate.evaluate import evaluate

    reward, rl, wanted = chosen
    reward_run = reward_command.train(Parsed(reward, fresh, False), REWARD)
    accuracy = reward_run.read("evaluation.json")["accuracy"]
    note(f"reward model: held-out accuracy {interval(accuracy, 3)} on excerpts of {reward.excerpt_tokens} tokens")
    rl_run = rl_command.train(Parsed(rl, fresh, False), POLICY)
    figures = rl_run.read("evaluation.json")
    if figures.get("prompts") != wanted.count or figures.get("seed") != wanted.seed:
        with activity(EVALUATION):
            figures = evaluate(wanted, on_progress=lambda line: note(f"{EVALUATION}: {line}"))
    return reward_run, rl_run, figures


def write_report(config: DemoConfig, reward_run: RunFolder, rl_run: RunFolder) -> Path:
    """Write the page of this run, the reward model and the folder's other finished PPO runs; return its path."""
    from apportion.report.page import write_report as write_page

    root = Path(config.output).expanduser()
    others = [p for p in sorted(root.glob("rl-*")) if p != rl_run.path and RunFolder(p, "rl").finished]
    return write_page([rl_run.path, *others, reward_run.path], root / "report.html")


def write_summary(
    config: DemoConfig,
    plan: Plan,
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
            "excerpts": plan.amounts.excerpts,
            "steps": plan.amounts.steps,
            "seed": config.seed,
            "dtype": plan.dtype,
            "seconds": round(seconds, 1),
            "planned_seconds": round(plan.seconds, 1),
            "peak_rss_mb": round(peak),
            "policy": str(rl_run.path / "final"),
            "reward_model": str(reward_run.path / "final"),
            "prompts": str(rl_run.path / "prompts.jsonl"),
            "samples": str(rl_run.path / "samples.jsonl"),
            "report": str(report),
        },
    )
    return folder.path / "summary.json"
