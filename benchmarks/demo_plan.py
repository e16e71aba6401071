"""The demo's plan beside what its parts take, at small amounts, and the constants that would have been right.

    python -m benchmarks.demo_plan                          # about a minute in bfloat16, two in float32
    python -m benchmarks.demo_plan --dtype float32 --threads 1
    python -m benchmarks.demo_plan --folder runs/plan       # stages that are finished there are left out
    python -m benchmarks.demo_plan --steps 30 --excerpts 8000 --probe 1000 --texts 1000 --prompts 128   # a whole demo

Runs the stages of `apportion demo`, with its settings, in a temporary folder or in --folder. The constants are those of
`apportion.stages.demo.cost`: efficiencies from the time of each kind of work (the median batch of PPO without its
first), fixed seconds from what is left of each part. What did not run, or was interrupted, has none.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from contextlib import suppress
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from apportion.cli.demo import Stages, stages, train, write_report
from apportion.cli.main import quiet_libraries
from apportion.config import DemoConfig
from apportion.errors import Interrupted
from apportion.stages.demo import cost
from apportion.stages.demo.cost import Amounts, Cost
from apportion.stages.demo.folder import machine_rates
from apportion.stages.demo.plan import EVALUATION, PAGE, POLICY, REWARD, Plan, lines_of
from apportion.stages.demo.table import describe, table
from apportion.system import cpu, heartbeat
from apportion.system.progress import activity, running
from apportion.system.schedule import Schedule

SMALL = {"excerpts": 128, "steps": 3, "prompts": 32, "probe": 128, "texts": 64}


class Recorder(Schedule):
    """A schedule that keeps the seconds of every activity, by their labels."""

    def __init__(self, plan: Plan) -> None:
        super().__init__("demo", plan.parts)
        self.spent: dict[tuple[str, ...], float] = defaultdict(float)

    def ended(self, labels: tuple[str, ...], seconds: float) -> None:
        """Keep the seconds."""
        super().ended(labels, seconds)
        self.spent[labels] += seconds


def main(arguments: list[str] | None = None) -> int:
    """Measure, print a table or one JSON object, and return 0."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for name, value in SMALL.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--folder", default=None, help="keeps the stages, and resumes them")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    quiet_libraries()
    cpu.keep_freed_memory()
    threads = cpu.configure_threads(options.threads).count
    amounts = Amounts(**{name: getattr(options, name) for name in SMALL})
    with TemporaryDirectory() as temporary, heartbeat.heartbeat():
        config = DemoConfig(output=options.folder or temporary, dtype=options.dtype, threads=threads)
        plan = small_plan(options.dtype, amounts)
        recorder = Recorder(plan)
        chosen = stages(config, amounts)
        with suppress(Interrupted), running(recorder):
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
    rates = machine_rates(name, "cpu")
    return Plan(amounts, name, rates, 60.0, lines_of(amounts, Cost(rates, name)))


def batches_of(chosen: Stages) -> list[dict[str, float]]:
    """Return the metrics of each batch of PPO but the first."""
    log = Path(chosen.rl.output) / "metrics.jsonl"
    lines = log.read_text(encoding="utf-8").splitlines() if log.is_file() else []
    return [json.loads(line) for line in lines[1:]]


def measured(recorder: Recorder, plan: Plan, batches: list[dict[str, float]]) -> dict[str, float]:
    """Return the constants of `cost` that give the seconds that were taken, of the parts that ended."""
    amounts, spent, ideal = plan.amounts, recorder.spent, Ideal(plan.rates, plan.dtype)
    taken = {
        (part.stage, part.within): seconds
        for part, seconds in zip(plan.parts, recorder.taken, strict=True)
        if seconds is not None and seconds > 1.0  # less is a stage that was finished before
    }
    found: dict[str, float] = {}
    for name, whole, label, operations in (
        ("reward", (REWARD, "loading"), (REWARD, "loading", "probing the head"), ideal.probing(amounts)),
        ("save", (REWARD, ""), (REWARD, "evaluating", "held-out texts"), ideal.judging(amounts)),
        ("evaluation", (EVALUATION, ""), (EVALUATION, "generating from fresh prompts"), 0.0),
    ):
        if whole in taken and label in spent:
            found[name] = taken[whole] - spent[label]
            found |= {f"read ({name})": operations / spent[label]} if operations else {"sampling": spent[label]}
    if (REWARD, "training") in taken:
        found["train"] = ideal.reward_training(amounts) / taken[REWARD, "training"]
    if batches and (POLICY, "training") in taken:
        phase = {name: median(batch[f"time/{name}"] for batch in batches) for name in ("generate", "score", "update")}
        found["generate"] = ideal.generation(amounts.rows) / phase["generate"]
        # the scores are in float32 in either precision
        low = plan.dtype != "float32"
        scores = Cost(plan.rates, plan.dtype).scores(amounts.rows) if low else 0.0
        found["score"] = (ideal.scoring(amounts.rows) - low * ideal.scores(amounts.rows)) / (phase["score"] - scores)
        found["update"] = ideal.update(amounts) / phase["update"]
        found |= {f"seconds of {name}": value for name, value in phase.items()}
        found["seconds of a batch"] = median(batch["time/total"] for batch in batches)
    fixed = {"policy": (POLICY, "loading"), "save policy": (POLICY, ""), "page": (PAGE, "")}
    return found | {name: taken[part] for name, part in fixed.items() if part in taken}


class Ideal(Cost):
    """Cost at efficiencies of 1 and without fixed seconds."""

    def share(self, kind: str, dtype: str) -> float:
        """Return 1."""
        return 1.0


def shown(constants: dict[str, float], dtype: str) -> list[str]:
    """Return a line for each constant: as it is, and as measured."""
    present: dict[str, float] = {**cost.EFFICIENCY[dtype], **cost.FIXED}
    lines = [f"  {'constant':<20} {'now':>8} {'measured':>8}"]
    for name, value in constants.items():
        now = present.get(name.partition(" (")[0])
        lines.append(f"  {name:<20} {'' if now is None else f'{now:.2f}':>8} {value:>8.2f}")
    return lines


if __name__ == "__main__":
    sys.exit(main())
