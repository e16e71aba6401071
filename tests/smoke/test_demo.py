"""`apportion demo` on tiny real models: the dry run, a line in every silence, planned beside taken, resuming."""

from __future__ import annotations

import json
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import tiny_runs
import yaml

from apportion.cli import demo
from apportion.cli.main import main
from apportion.config import DemoConfig, LoraConfig, PPOConfig, SamplingConfig
from apportion.stages.demo.cost import Amounts
from apportion.stages.demo.folder import plan_demo, store
from apportion.stages.demo.plan import FETCH, Plan
from apportion.system import heartbeat

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
SILENCE = 0.1  # seconds, where a command has 25
ROOM = 30 - heartbeat.SILENCE  # for a thread that holds Python's lock meanwhile
AMOUNTS = Amounts(excerpts=24, steps=2, prompts=4, batch=8, probe=8, texts=8, rows=4, epochs=1)


def tiny_stages(world: Path, config: DemoConfig, amounts: Amounts) -> demo.Stages:
    """Return the demo's stages on the tiny models and texts of `world`."""
    reward, rl, evaluation = demo.stages(config, amounts)
    policy, prompts = str(world / "policy"), str(world / "prompts.jsonl")
    reward = reward.model_copy(update={"model": policy, "data": str(world / "reviews.csv"), "excerpt_tokens": [2, 8]})
    sampling = SamplingConfig(batch_size=amounts.rows, max_new_tokens=4, prompt_tokens=[2, 3])
    rl = rl.model_copy(update={"policy": policy, "prompts": prompts, "sampling": sampling, "lora": LoraConfig(rank=2)})
    rl.ppo = PPOConfig(epochs=1, mini_batch=4)
    return demo.Stages(reward, rl, evaluation.model_copy(update={"prompts": prompts, "judge": False}))


def without_fetching(plan: Plan) -> Plan:
    return plan._replace(lines=tuple(line for line in plan.lines if line.part.stage != FETCH))


def test_a_demo_is_never_silent_and_shows_its_plan_beside_what_it_took(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = tiny_runs.world(tmp_path)
    config = DemoConfig(output=str(tmp_path / "demo"), dtype="float32", threads=1, excerpts=24, steps=2, count=4)
    written: list[tuple[float, str]] = []

    class Stream:
        def write(self, text: str) -> int:
            written.append((time.monotonic(), text))
            return len(text)

        def flush(self) -> None: ...

        def isatty(self) -> bool:
            return False

    monkeypatch.setattr("sys.stderr", Stream())
    monkeypatch.setattr(heartbeat.Heartbeat.__init__, "__defaults__", (SILENCE, heartbeat.stderr.write))
    began = time.monotonic()
    with heartbeat.heartbeat():
        plan = without_fetching(plan_demo(config, demo.rl_folder(config)))
        chosen = tiny_stages(world, config, AMOUNTS)
        taken, reward_run, rl_run, figures = demo.run_plan(plan, config, chosen)
    times = [began, *(when for when, text in written if text.strip()), time.monotonic()]
    assert max(after - before for before, after in pairwise(times)) < SILENCE + ROOM
    lines = "".join(text for _, text in written).splitlines()
    assert any(line.startswith("measuring the machine") for line in lines)
    for stage in ("1/3 reward model", "2/3 PPO"):  # the others may end before a line is due
        assert any(line.startswith(stage) for line in lines), stage
    beats = [line for line in lines if " so far" in line and not line.startswith("measuring")]
    assert beats and all("demo" in line and " left" in line for line in beats)

    stored = json.loads((tmp_path / "demo" / "plan.json").read_text())
    assert [part["taken_seconds"] for part in stored["parts"]] == [round(taken[p] or 0, 1) for p in plan.parts]
    assert None not in taken.values() and (stored["excerpts"], stored["steps"]) == (24, 2)
    assert figures["prompts"] == 4 and (tmp_path / "demo" / "report.html").is_file()
    assert rl_run.finished and reward_run.finished
    judged = {f"judge_{when}": {"mean": 0.5, "low": 0.4, "high": 0.6} for when in ("before", "after")}
    report = tmp_path / "demo" / "report.html"
    summary = demo.write_summary(config, plan, reward_run, rl_run, figures | judged, report, 1.0, 2.0)
    written_there = json.loads(summary.read_text())
    assert written_there["excerpts"] == 24 and written_there["planned_seconds"] == round(plan.seconds, 1)
    assert [key for key in written_there if f"`{key}`" not in README] == []

    # the same command again: the amounts are those of the folder, what is finished takes no time
    again = DemoConfig(output=config.output, dtype="float32", count=4, steps=2)
    same = plan_demo(again, demo.rl_folder(config))
    assert (same.amounts.excerpts, same.amounts.steps) == (24, 2)
    assert {part.seconds for part in same.parts if part.stage != "page"} == {0.0}
    arm = DemoConfig(output=config.output, dtype="float32", credit="uniform", count=4)
    other = plan_demo(arm, demo.rl_folder(arm))
    assert {part.stage for part in other.parts if part.seconds == 0} == {"1/3 reward model"}
    assert other.amounts.excerpts == 24 and other.amounts.steps >= 20  # 2 was set for the other one
    # a plan without a number that was set gives the next credit as many batches
    store(other, arm, {})
    assert (
        plan_demo(arm.model_copy(update={"credit": "sparse"}), tmp_path / "demo" / "rl-sparse").amounts == other.amounts
    )
    (tmp_path / "demo" / "reward" / "config.yaml").write_text("excerpts: [")
    assert plan_demo(arm, demo.rl_folder(arm)).amounts.excerpts >= 3000  # opening the run says what is wrong with it
    fresh = plan_demo(arm, demo.rl_folder(arm), fresh=True)
    assert fresh.amounts.excerpts >= 3000 and all(part.seconds > 0 for part in fresh.parts)


def test_dry_run_prints_plan_and_settings_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "demo"
    assert main(["demo", "--dry-run", "--output", str(output), "--minutes", "0.1", "--dtype", "float32"]) == 0
    printed = capsys.readouterr()
    settings: list[dict[str, Any]] = list(yaml.safe_load_all(printed.out))
    assert [part.get("excerpts") for part in settings] == [3000, 3000, None, None]
    assert settings[2]["steps"] == settings[0]["steps"] == 20 and settings[3]["count"] == 128
    assert {part["dtype"] for part in settings} == {"float32"}
    assert "this machine: " in printed.err and "188 steps of 16" in printed.err
    assert "longer than the 6 s it aims at" in printed.err and "in all" in printed.err
    assert not output.exists()
