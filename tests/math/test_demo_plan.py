"""The demo's plan: seconds and amounts by hand, the time left of planned work, the table."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from benchmarks import demo_plan

from apportion.stages.demo.cost import CONVERSION, EFFICIENCY, FIXED, Amounts, Cost, fetching
from apportion.stages.demo.plan import EVALUATION, POLICY, REWARD, SIZES, Plan, as_json, lines_of, make_plan
from apportion.stages.demo.table import describe, table
from apportion.system import progress
from apportion.system.progress import Activity, activity, running
from apportion.system.rates import Rates, measure
from apportion.system.schedule import Part, Schedule

FAST, SLOW = Rates(1e15, 1e15, 1e15), Rates(1e9, None, 1e9)


class Half(Cost):
    """Cost at an efficiency of one half."""

    def share(self, kind: str, dtype: str) -> float:
        return 0.5


def test_seconds_by_hand() -> None:
    cost, amounts = Half(Rates(2e11, None, 1e11), "float32"), Amounts(excerpts=1000, steps=10, prompts=64)
    # 106,168,320 weights in the blocks, 28,311,552 in the output layer; 1e11 operations a second
    assert cost.reward_training(amounts) == pytest.approx(4 * 106_168_320 * 36 * 1000 / 1e11)  # 152.9 s
    assert cost.probing(amounts) == pytest.approx(2 * 106_168_320 * 36 * 1000 / 1e11)
    assert cost.judging(amounts) == pytest.approx(2 * 106_168_320 * (36 * 1000 + 40 * 500) / 1e11)
    passes = 32 * (106_168_320 * 30 + 28_311_552 * 24)  # weights times tokens of one batch: 1.237e11
    assert cost.generation(32) == pytest.approx(2 * passes / 1e11)  # 2.47 s
    assert cost.scoring(32) == pytest.approx((4 * passes + 2 * 32 * 106_168_320 * 30) / 1e11)
    assert cost.update(amounts) == pytest.approx(2 * 4 * passes / 1e11)
    batch = (2 + 4 + 8) * passes / 1e11 + 2 * 32 * 106_168_320 * 30 / 1e11
    assert cost.policy_training(amounts) == pytest.approx(10 * batch)
    sampled = 6 * passes / 1e11 + 2 * 32 * 106_168_320 * 30 / 1e11
    assert cost.evaluation(amounts) == pytest.approx(FIXED["evaluation"] + 4 * sampled)  # 64 prompts, twice, 32 at once


def test_slow_memory_bounds_generation_and_bfloat16_reads_half() -> None:
    weights = 106_168_320 + 28_311_552
    slow = Rates(2e11, 8e11, 1e9)
    assert Half(slow, "float32").generation(32) == pytest.approx(24 * weights * 4 / 1e9)  # 12.9 s
    assert Half(slow, "bfloat16").generation(32) == pytest.approx(24 * weights * 2 / 1e9)


def test_the_reward_model_scores_in_float32_in_either_precision() -> None:
    tokens, passes = 32 * 30, 32 * (106_168_320 * 30 + 28_311_552 * 24)
    cost = Half(Rates(2e11, 8e11, 1e11), "bfloat16")
    assert cost.scoring(32) == pytest.approx(4 * passes / 4e11 + 2 * tokens * 106_168_320 / 1e11)


def test_amounts_fit_the_minutes() -> None:
    assert make_plan(FAST, "bfloat16").amounts[:2] == SIZES[-1]
    least = make_plan(SLOW, "float32")
    assert least.amounts[:2] == SIZES[0] and not least.fits
    assert least.seconds == pytest.approx(sum(line.part.seconds for line in least.lines))
    seconds = {size: make_plan(SLOW, "float32", excerpts=size[0], steps=size[1]).seconds for size in SIZES}
    assert sorted(seconds.values()) == list(seconds.values())  # each size takes longer than the one before
    for size, taken in seconds.items():
        assert make_plan(SLOW, "float32", minutes=(taken + 1) / 60).amounts[:2] == size
    assert make_plan(SLOW, "float32", excerpts=64, minutes=1e6).amounts[:2] == (64, SIZES[-1][1])
    assert make_plan(FAST, "float32", steps=7, prompts=32).amounts == Amounts(SIZES[-1][0], 7, 32)


def test_what_is_done_takes_no_time_and_fetching_does() -> None:
    plan = make_plan(FAST, "float32", finished=[REWARD, POLICY, EVALUATION], megabytes=100)
    seconds = {(line.part.stage, line.part.within): line.part.seconds for line in plan.lines}
    assert seconds.pop(("fetch", "")) == fetching(100) == pytest.approx(100 / 5 + CONVERSION)
    assert seconds.pop(("page", "")) == FIXED["page"] and set(seconds.values()) == {0.0}
    assert plan.parts[0].stage == REWARD  # the schedule leaves the network out
    stored = as_json(plan, {plan.lines[0].part: 31.26})
    assert [part["taken_seconds"] for part in stored["parts"]][:2] == [31.3, None]
    assert stored["planned_seconds"] == round(plan.seconds, 1) and stored["rates"]["float32"] == 1e15


def test_the_table() -> None:
    plan = make_plan(Rates(2e11, None, 2e10), "float32", excerpts=3000, steps=20)
    text = describe(plan, 2)
    assert text.startswith("this machine: 200 GFLOP/s in float32, reads 20 GB/s (2 threads)\n")
    lines = table(plan)
    assert [line.split()[0] for line in lines] == ["1/3", "188", "save,", "2/3", "20", "save", "3/3", "page", "in"]
    assert "load, start its head on 1,000 excerpts" in lines[0] and len({len(line) for line in lines}) == 1
    taken: dict[Part, float | None] = dict.fromkeys(plan.parts, 61.0) | {plan.parts[-1]: None}
    beside = table(plan, taken)
    assert beside[0].split() == ["planned", "taken"] and beside[1].endswith("1 min 01 s")
    assert beside[-2].endswith("–") and beside[-1].endswith("7 min 07 s")
    slow = describe(make_plan(SLOW, "float32"), 1)
    assert "longer than the 16 min 00 s it aims at, and the least work" in slow
    assert "smaller --excerpts" in describe(make_plan(SLOW, "float32", steps=100), 1)


@dataclass
class Clock:
    now: float = 0.0

    def __call__(self) -> float:
        return self.now


def test_time_left_of_planned_work() -> None:
    clock = Clock()
    schedule = Schedule("demo", [Part("one", "loading", 10), Part("one", "training", 100), Part("one", "", 20),
                                 Part("two", "", 50)], clock)  # fmt: skip

    def inner(label: str, total: int | None = None) -> Activity:
        return Activity(label, total, clock=clock)

    assert schedule.seconds_left == 180
    with running(schedule):
        with running(inner("one")):
            clock.now = 1.0
            assert schedule.seconds_left == 179  # of the first part, though it has not begun
            with running(inner("loading")):
                clock.now = 4.0
                assert schedule.seconds_left == 176
                with running(inner("probing", 2)):
                    clock.now = 20.0
                    assert schedule.seconds_left == 170  # late: nothing is left of this part
            with running(inner("training", 10)) as steps:
                clock.now = 30.0
                assert schedule.taken[0] == 19.0  # from 1 to 20
                steps.advance()
                # 10 s a step, so 90 s; the rest at 1.9 times what is planned, as the first part
                assert schedule.seconds_left == pytest.approx(90 + 1.9 * 70)
                assert progress.describe(progress.current()) == (
                    "one: training, 1 of 10, 10 s so far, about 1 min 30 s left; demo: about 3 min 43 s left"
                )
                clock.now = 130.0
            with running(inner("saving")):
                clock.now = 133.0
        assert schedule.taken == [19.0, 110.0, pytest.approx(4.0), None]  # 133 in all
        with running(inner("two")):
            assert schedule.seconds_left == pytest.approx(50 * 133 / 130)
        assert progress.describe(progress.current()) == "demo, 2 min 13 s so far, about 0 s left"
    assert schedule.taken[-1] == 0.0
    with activity("another"):  # outside of a schedule nothing is added
        assert progress.left_of_all(progress.current()) == ""


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_benchmark_finds_the_constants_of_a_run_that_kept_to_its_plan(dtype: str) -> None:
    rates, amounts = Rates(2e11, 8e11, 1e12), Amounts(excerpts=64, steps=3)
    cost, plan = Cost(rates, dtype), Plan(amounts, dtype, rates, 1.0, lines_of(amounts, Cost(rates, dtype)))
    recorder = demo_plan.Recorder(plan)
    recorder.ended((REWARD, "loading", "probing the head"), cost.probing(amounts))
    recorder.ended((REWARD, "evaluating", "held-out texts"), cost.judging(amounts))
    recorder.ended((EVALUATION, "generating from fresh prompts"), 3.0)
    recorder.taken = [part.seconds for part in plan.parts]
    phases = {"generate": cost.generation(32), "score": cost.scoring(32), "update": cost.update(amounts)}
    batch = {f"time/{name}": seconds for name, seconds in phases.items()} | {"time/total": sum(phases.values())}
    found = demo_plan.measured(recorder, plan, [batch])
    share = EFFICIENCY[dtype]
    assert found["read (reward)"] == pytest.approx(share["read"]) == pytest.approx(found["read (save)"])
    work = ("train", "generate", "score", "update")
    assert [found[name] for name in work] == pytest.approx([share[name] for name in work])
    assert found["evaluation"] == pytest.approx(plan.parts[-2].seconds - 3.0)
    fixed = [name for name in FIXED if name != "evaluation"]
    assert [found[name] for name in fixed] == pytest.approx([FIXED[name] for name in fixed])
    assert len(demo_plan.shown(found, dtype)) == len(found) + 1
    recorder.taken = [None] * len(plan.parts)
    assert demo_plan.measured(recorder, plan, []) == {}


def test_measured_rates() -> None:
    rates = measure("bfloat16", seconds=0.0)
    assert rates.bfloat16 is not None and min(rates.float32, rates.bfloat16, rates.reading) > 1e6
    assert rates.products("float32") == rates.float32 and rates.products("bfloat16") == rates.bfloat16
    plain = Rates(1.0, None, 2.0)
    assert measure("float32", seconds=0.0).bfloat16 is None and plain.products("bfloat16") == 1.0
