"""The plan of a recipe: what each stage reads, its seconds and its memory on this machine, as lines of text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from apportion.config.chain.resolve import Stage
from apportion.models.fast.onednn import linear
from apportion.models.loading import pick_device, pick_dtype
from apportion.stages.doctor.checks.machine import free_memory
from apportion.stages.recipe.estimate import Estimate, estimated
from apportion.stages.recipe.inputs import Input
from apportion.stages.recipe.run import Todo
from apportion.stages.recipe.shapes import bases, size_of
from apportion.stages.recipe.tables import Made, Table, described, is_table, table_of, will_make
from apportion.system.progress import duration
from apportion.system.rates import Work, measure

GB = 1e9


class Line(NamedTuple):
    """A stage of the plan: what it reads, and its estimate."""

    stage: Stage
    action: str
    inputs: Sequence[tuple[Input, Table | None]]
    estimate: Estimate


def make_plan(work: Sequence[Todo], machine: Work) -> list[Line]:
    """Return the plan; only rows of files are read, and headers of weights.

    Raises:
        DataError: a file of rows that cannot be read.
    """
    stages = [one.stage for one in work]
    started = bases(stages, {one.stage.name: one.inputs for one in work})
    made: Made = {}
    lines = []
    for stage, inputs, action in work:
        found = [(one, table_of(one, stage, made) if is_table(one) else None) for one in inputs]
        tables = {one.setting: table for one, table in found if is_table(one)}
        made |= will_make(stage, inputs, tables)
        estimate = estimated(stage, size_of(started.get(stage.name, "")), tables, machine)
        lines.append(Line(stage, action, found, estimate))
    return lines


def measured() -> Work:
    """Return what this machine does, measured in about a second."""
    device = pick_device("auto")
    dtype = str(pick_dtype("auto", device)).removeprefix("torch.")
    rates = measure(dtype, str(device), product=lambda x, weight: linear(x, weight, None))
    return Work(rates, dtype)


def seconds_of(lines: Sequence[Line]) -> dict[str, float]:
    """Return {stage: seconds} where they are known."""
    return {line.stage.name: line.estimate.seconds or 0.0 for line in lines}


def table(lines: Sequence[Line], machine: Work) -> list[str]:
    """Return the plan as lines of text."""
    free = free_memory(pick_device("auto"))
    rate = machine.rates.products(machine.dtype) / GB
    text = [f"this machine: {rate:.0f} GFLOP/s in {machine.dtype}, {free / GB:.1f} GB of memory free", ""]
    width = max(len(line.stage.name) for line in lines)
    for line in lines:
        text.append(f"  {line.stage.name:<{width}}  {line.stage.kind:<8}  {cost(line)}")
        for one, rows in line.inputs:
            if is_table(one):
                text.append(f"  {'':<{width}}            {one.setting}: {one.name}: {described(one, rows)}")
    left = [line.estimate.seconds for line in lines if line.action not in ("skip", "leave")]
    known = [one for one in left if one is not None]
    unknown = f", and {len(left) - len(known)} stages whose time is not known" if len(left) > len(known) else ""
    text += [
        "",
        f"in all about {duration(sum(known))}{unknown}: an estimate for an idle machine, good to a factor of two.",
    ]
    most = max((line.estimate.memory or 0.0 for line in lines), default=0.0)
    if most > free:
        text.append(f"warning: a stage may need {most / GB:.1f} GB, more than is free: lower its micro_batch.")
    return text


def cost(line: Line) -> str:
    """Return a stage's time and memory in words."""
    if line.action in ("skip", "leave"):
        return "finished" if line.action == "skip" else "not in this call"
    seconds, memory, why = line.estimate
    time = "time not known" if seconds is None else f"about {duration(seconds)}"
    space = "" if memory is None else f", {memory / GB:.1f} GB"
    return f"{time}{space}{f' ({why})' if why else ''}"
