"""The demo's plan beside what its parts take, at small amounts, and the constants that would have been right.

    python -m benchmarks.demo_plan                          # about a minute in bfloat16, two in float32
    python -m benchmarks.demo_plan --dtype float32 --threads 1
    python -m benchmarks.demo_plan --steps 30 --excerpts 8000 --probe 2000 --texts 1000 --prompts 128   # a whole demo

Runs the stages of `apportion demo`, with its settings, in a temporary folder. The constants are those of
`apportion.stages.demo.cost`: efficiencies from the time of each kind of work (the median batch of PPO without its
first), fixed seconds from what is left of each part.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from apportion.cli.demo import Stages, stages, train, write_report
from apportion.cli.main import quiet_libraries
from apportion.config import DemoConfig
from apportion.stages.demo import cost
from apportion.stages.demo.cost import Amounts, Cost
from apportion.stages.demo.plan import EVALUATION, PAGE, POLICY, REWARD, Plan, lines_of
from apportion.stages.demo.table import describe, table
from apportion.system import cpu, heartbeat
from apportion.system.progress import activity, running
from apportion.system.rates import measure
from apportion.system.schedule import Schedule

SMALL = {"excerpts": 160, "steps": 3, "prompts": 32, "probe": 256, "texts": 128}


class Recorder(Schedule):
    """A schedule that keeps the seconds of every activity, by their labels."""

    def __init__(self, plan: Plan) -> None:
        super().__init__("demo", plan.parts)
        self.seconds: dict[tuple[str, ...], float] = defaultdict(float)

    def ended(self, labels: tuple[str, ...], seconds: float) -> None:
        """Keep the seconds."""
        super().ended(labels, seconds)
        self.seconds[labels] += seconds


def main(arguments: list[str] | None = None) -> int:
    """Measure, print a table or one JSON object, and return 0."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for name, value in SMALL.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    quiet_libraries()
    cpu.keep_freed_memory()
    threads = cpu.configure_threads(options.threads).count
    amounts = Amounts(**{name: getattr(options, name) for name in SMALL})
    with TemporaryDirectory() as folder, heartbeat.heartbeat():
        config = DemoConfig(output=folder, dtype=options.dtype, threads=threads)
        plan = small_plan(options.dtype, amounts)
        recorder = Recorder(plan)
        chosen = stages(config, amounts)
        with running(recorder):
            reward_run, rl_run, _ = train(chosen)
            with activity(PAGE):
                write_report(config, reward_run, rl_run)
        constants = measured(recorder, plan, batches_of(chosen))
    taken = dict(zip(plan.parts, recorder.taken, strict=True))
    if options.json:
        rows = [{"part": w, "planned": p.seconds, "taken": taken[p]} for p, w in plan.lines]
        sys.stdout.write(json.dumps({"rates": plan.rates._asdict(), "parts": rows, "constants": constants}) + "\n")
    else:
        sys.stdout.write(describe(plan, threads).split("\n\n")[0] + "\n" + "\n".join(table(plan, taken)) + "\n\n")
        sys.stdout.write("\n".join(shown(constants, plan.dtype)) + "\n")
    return 0


def small_plan(dtype: str, amounts: Amounts) -> Plan:
    """Return the plan for the amounts, whatever its time."""
    from apportion.models.loading import pick_device, pick_dtype

    name = str(pick_dtype(dtype, pick_device("auto"))).removeprefix("torch.")
    rates = measure(name)
    return Plan(amounts, name, rates, 60.0, lines_of(amounts, Cost(rates, name)))


def batches_of(chosen: Stages) -> list[dict[str, float]]:
    """Return the metrics of each batch of PPO but the first."""
    lines = (Path(chosen.rl.output) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines[1:]]


def measured(recorder: Recorder, plan: Plan, batches: list[dict[str, float]]) -> dict[str, Any]:
    """Return the constants of `cost` that give the seconds that were taken."""
    amounts, seconds = plan.amounts, recorder.seconds
    ideal = Ideal(plan.rates, plan.dtype)
    phase = {name: median(batch[f"time/{name}"] for batch in batches) for name in ("generate", "score", "update")}
    probing = seconds[REWARD, "loading", "probing the head"]
    judging = seconds[REWARD, "evaluating", "held-out texts"]
    sampling = seconds[EVALUATION, "generating from fresh prompts"]
    taken = {(part.stage, part.within): time or 0.0 for part, time in zip(plan.parts, recorder.taken, strict=True)}
    whole = sum(phase.values())
    return {
        "read": (ideal.probing(amounts) + ideal.judging(amounts)) / (probing + judging),
        "train": ideal.reward_training(amounts) / taken[REWARD, "training"],
        "generate": ideal.generation(amounts.rows) / phase["generate"],
        "score": ideal.scoring(amounts.rows) / phase["score"],
        "update": ideal.update(amounts) / phase["update"],
        "batch": whole,
        "other in a batch": median(batch["time/total"] for batch in batches) - whole,
        "sampling": sampling,
        "reward": taken[REWARD, "loading"] - probing,
        "save": taken[REWARD, ""] - judging,
        "policy": taken[POLICY, "loading"],
        "save policy": taken[POLICY, ""],
        "evaluation": taken[EVALUATION, ""] - sampling,
        "page": taken[PAGE, ""],
    }


class Ideal(Cost):
    """Cost at efficiencies of 1 and without fixed seconds."""

    def share(self, kind: str, dtype: str) -> float:
        """Return 1."""
        return 1.0


def shown(constants: dict[str, Any], dtype: str) -> list[str]:
    """Return a line for each constant: as it is, and as measured."""
    present: dict[str, float] = {**cost.EFFICIENCY[dtype], **cost.FIXED}
    before = {name: f"{value:.2f}" for name, value in present.items()}
    head = f"  {'constant':<17} {'now':>8} {'measured':>8}"
    return [head, *(f"  {name:<17} {before.get(name, ''):>8} {value:>8.2f}" for name, value in constants.items())]


if __name__ == "__main__":
    sys.exit(main())
