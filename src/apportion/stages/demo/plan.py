"""Plan of a demo: the amounts of work that fit the machine and the time, and the seconds of each part."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from apportion.stages.demo.cost import Amounts, Cost, fetching
from apportion.system.rates import Rates
from apportion.system.schedule import Part

REWARD, POLICY, EVALUATION, PAGE = "1/3 reward model", "2/3 PPO", "3/3 evaluation", "page"
FETCH = "fetch"
MINUTES = {"float32": 16.0, "bfloat16": 7.5}  # that a demo aims at, where nothing is set
# (excerpts of the reward model, batches of PPO), from the least that LOG.md has shown to change the judge to the most
# that is worth its time. A few sizes, not any number, so that two runs on one machine do the same.
SIZES = ((3000, 20), (3000, 25), (4000, 25), (5000, 30), (6500, 30), (8000, 30))


class Line(NamedTuple):
    """One line of the plan: the part that it is, in words, and its seconds."""

    part: Part
    words: str


class Plan(NamedTuple):
    """What a demo will do.

    Attributes:
        amounts: of work. dtype: of the policy and of the reward model's training. rates: of the machine.
        minutes: that it aims at. lines: its parts, in order; fetching comes first where there is something to fetch.
    """

    amounts: Amounts
    dtype: str
    rates: Rates
    minutes: float
    lines: tuple[Line, ...]

    @property
    def seconds(self) -> float:
        """Seconds of all parts together."""
        return sum(line.part.seconds for line in self.lines)

    @property
    def fits(self) -> bool:
        """Whether it takes no longer than it aims at."""
        return self.seconds <= 60 * self.minutes

    @property
    def parts(self) -> list[Part]:
        """The parts but for the fetching, whose time is the network's."""
        return [line.part for line in self.lines if line.part.stage != FETCH]


def make_plan(
    rates: Rates,
    dtype: str,
    *,
    minutes: float | None = None,
    excerpts: int | None = None,
    steps: int | None = None,
    prompts: int = 128,
    megabytes: float = 0.0,
    finished: Collection[str] = (),
) -> Plan:
    """Return the plan with the largest of `SIZES` that takes no longer than `minutes`, or the smallest.

    Args:
        minutes: None takes those of `MINUTES` for the precision.
        excerpts, steps: numbers that are set; they take the place of those of every size.
        megabytes: that have to be fetched. finished: labels of stages that are done, and take no time.
    """
    goal = MINUTES[dtype] if minutes is None else minutes
    plans = []
    for size in SIZES:
        amounts = Amounts(excerpts or size[0], steps or size[1], prompts)
        lines = lines_of(amounts, Cost(rates, dtype), megabytes, finished)
        plans.append(Plan(amounts, dtype, rates, goal, lines))
    return max((plan for plan in plans if plan.fits), key=lambda plan: plan.seconds, default=plans[0])


def lines_of(amounts: Amounts, cost: Cost, megabytes: float = 0.0, finished: Collection[str] = ()) -> tuple[Line, ...]:
    """Return the lines of a plan for `amounts`."""
    training = f"{amounts.reward_steps} steps of {amounts.batch} excerpts"
    rows: list[tuple[str, str, float, str]] = [
        (REWARD, "loading", cost.reward_start(amounts), f"load, start its head on {amounts.probe:,} excerpts"),
        (REWARD, "training", cost.reward_training(amounts), training),
        (REWARD, "", cost.reward_end(amounts), f"save, evaluate on {amounts.texts:,} texts"),
        (POLICY, "loading", cost.policy_start(), "load policy and reward model"),
        (POLICY, "training", cost.policy_training(amounts), f"{amounts.steps} batches of {amounts.rows} responses"),
        (POLICY, "", cost.policy_end(), "save"),
        (EVALUATION, "", cost.evaluation(amounts), f"{amounts.prompts} prompts before and after, the judge"),
        (PAGE, "", cost.page(), "write the page"),
    ]
    if megabytes:
        rows.insert(0, (FETCH, "", fetching(megabytes), f"fetch the model and the reviews, {megabytes:.0f} MB"))
    return tuple(
        Line(Part(stage, within, 0.0), f"{words}: done")
        if stage in finished
        else Line(Part(stage, within, seconds), words)
        for stage, within, seconds, words in rows
    )


def as_json(plan: Plan, taken: Mapping[Part, float | None]) -> dict[str, Any]:
    """Return the plan, and the seconds that its parts took, as plan.json has them."""
    parts = [
        {
            "stage": line.part.stage,
            "what": line.words,
            "planned_seconds": round(line.part.seconds, 1),
            "taken_seconds": None if (seconds := taken.get(line.part)) is None else round(seconds, 1),
        }
        for line in plan.lines
    ]
    return {
        "excerpts": plan.amounts.excerpts,
        "steps": plan.amounts.steps,
        "minutes": plan.minutes,
        "dtype": plan.dtype,
        "rates": plan.rates._asdict(),
        "planned_seconds": round(plan.seconds, 1),
        "parts": parts,
    }
