"""The plan of a demo in its folder: measured and made, kept for the calls that resume it, written with what it took."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from apportion.config import DemoConfig
from apportion.data.assets import builtin_model, builtin_table, missing_megabytes
from apportion.models.fast.onednn import linear
from apportion.models.loading import pick_device, pick_dtype
from apportion.stages.demo.plan import EVALUATION, POLICY, REWARD, Plan, as_json, make_plan
from apportion.system import safe_yaml
from apportion.system.progress import activity
from apportion.system.rates import Rates, measure
from apportion.system.schedule import Part
from apportion.training.run_folder import RunFolder, explain_disk_errors

PLAN = "plan.json"  # in the demo's folder
MODEL, DATA = "smollm2", "imdb"


def plan_demo(config: DemoConfig, rl: Path, *, fresh: bool = False) -> Plan:
    """Measure the machine and return the plan; what the folder holds keeps its amounts, so that it can be resumed.

    Args:
        rl: the folder of the PPO stage.
    """
    root = Path(config.output).expanduser()
    folders = {REWARD: RunFolder(root / "reward", "reward"), POLICY: RunFolder(rl, "rl")}
    finished = [] if fresh else [stage for stage, folder in folders.items() if folder.finished]
    if POLICY in finished and folders[POLICY].read("evaluation.json").get("prompts") == config.count:
        finished.append(EVALUATION)
    excerpts, steps = config.excerpts, config.steps
    if not fresh:
        excerpts = excerpts or stored_count(folders[REWARD], "excerpts")
        steps = steps or stored_count(folders[POLICY], "steps") or default_steps(root)
    device = pick_device("auto")
    dtype = str(pick_dtype(config.dtype, device)).removeprefix("torch.")
    with activity("measuring the machine"):
        rates = machine_rates(dtype, str(device))
    return make_plan(
        rates,
        dtype,
        minutes=config.minutes,
        excerpts=excerpts,
        steps=steps,
        prompts=config.count,
        megabytes=missing_megabytes(MODEL, DATA),
        finished=finished,
    )


def machine_rates(dtype: str, device: str) -> Rates:
    """Return the rates of the machine, by the products that models are computed with."""
    return measure(dtype, device, product=lambda x, weight: linear(x, weight, None))


def stored_count(run: RunFolder, name: str) -> int | None:
    """Return the setting `name` of a run that was begun, or None."""
    try:
        text = (run.path / "config.yaml").read_text(encoding="utf-8") if run.started else ""
        return count(safe_yaml.load(text), name)
    except (OSError, UnicodeDecodeError, yaml.YAMLError):  # opening the run reports it
        return None


def default_steps(root: Path) -> int | None:
    """Return the batches of PPO of an earlier call that set no number, so that another credit gets as many, or None."""
    return count(RunFolder(root, "demo").read(PLAN), "default_steps")


def count(values: Any, name: str) -> int | None:
    """Return the number `name` where `values` is a mapping with a whole one above 0 of this name, else None."""
    value = values.get(name) if isinstance(values, dict) else None
    return value if type(value) is int and value > 0 else None


def store(plan: Plan, config: DemoConfig, taken: Mapping[Part, float | None]) -> None:
    """Write plan.json: settings, rates, amounts, and seconds planned and taken."""
    root = Path(config.output).expanduser()
    default = plan.amounts.steps if config.steps is None else default_steps(root)
    with explain_disk_errors(root):
        root.mkdir(parents=True, exist_ok=True)
        RunFolder(root, "demo").write_json(PLAN, {**as_json(plan, taken), "default_steps": default})


def fetch() -> None:
    """Fetch the model and the reviews into the cache."""
    builtin_model(MODEL)
    builtin_table(DATA)
