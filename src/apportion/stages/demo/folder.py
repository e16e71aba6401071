"""The plan of a demo in its folder: measured and made, kept for the calls that resume it, written with what it took."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from apportion.config import DemoConfig
from apportion.data.assets import builtin_model, builtin_table, missing_megabytes
from apportion.models.loading import pick_device, pick_dtype
from apportion.stages.demo.plan import EVALUATION, POLICY, REWARD, Plan, as_json, make_plan
from apportion.system.progress import activity
from apportion.system.rates import measure
from apportion.system.schedule import Part
from apportion.training.run_folder import RunFolder, explain_disk_errors

PLAN = "plan.json"  # in the demo's folder
MODEL, DATA = "smollm2", "imdb"
STORED = ("minutes", "dtype")  # settings under which a folder's amounts stay those of its first call


def plan_demo(config: DemoConfig, rl: Path, *, fresh: bool = False) -> Plan:
    """Measure the machine and return the plan; a folder that was begun keeps its amounts, so that it can be resumed.

    Args:
        rl: the folder of the PPO stage.
    """
    root = Path(config.output).expanduser()
    before = {} if fresh else begun(root, config)
    folders = {REWARD: RunFolder(root / "reward", "reward"), POLICY: RunFolder(rl, "rl")}
    finished = [] if fresh else [stage for stage, folder in folders.items() if folder.finished]
    if POLICY in finished and folders[POLICY].read("evaluation.json").get("prompts") == config.count:
        finished.append(EVALUATION)
    device = pick_device("auto")
    dtype = str(pick_dtype(config.dtype, device)).removeprefix("torch.")
    with activity("measuring the machine"):
        rates = measure(dtype, str(device))
    return make_plan(
        rates,
        dtype,
        minutes=config.minutes,
        excerpts=config.excerpts or before.get("excerpts"),
        steps=config.steps or before.get("steps"),
        prompts=config.count,
        megabytes=missing_megabytes(MODEL, DATA),
        finished=finished,
    )


def begun(root: Path, config: DemoConfig) -> dict[str, Any]:
    """Return plan.json of an earlier call with the same settings of time and precision, or {}."""
    stored = RunFolder(root, "demo").read(PLAN)
    same = all(stored.get("settings", {}).get(name) == getattr(config, name) for name in STORED)
    return stored if same else {}


def store(plan: Plan, config: DemoConfig, taken: Mapping[Part, float | None]) -> None:
    """Write plan.json: settings, rates, amounts, and seconds planned and taken."""
    root = Path(config.output).expanduser()
    settings = {name: getattr(config, name) for name in STORED}
    with explain_disk_errors(root):
        root.mkdir(parents=True, exist_ok=True)
        RunFolder(root, "demo").write_json(PLAN, {"settings": settings, **as_json(plan, taken)})


def fetch() -> None:
    """Fetch the model and the reviews into the cache."""
    builtin_model(MODEL)
    builtin_table(DATA)
