"""Rows that a recipe's stages will read: counted in files that are here, derived for those that a stage will make."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from apportion.config.chain.resolve import Stage
from apportion.data.assets import BUILTIN_DATA
from apportion.data.tables import iter_rows
from apportion.errors import DataError
from apportion.stages.recipe.inputs import Input
from apportion.stages.split.split import plan_files

CHARACTERS = 4.0  # a token of English, about
DATA = ("data", "prompts", "test_data", "ppo.ptx_data", "keep_best.prompts")  # the settings that name tables


class Table(NamedTuple):
    """What is known of a table.

    Attributes:
        rows: in it. prompt: mean tokens of a prompt, about. answer: mean tokens of an answer, about.
        answers: in all rows together.
    """

    rows: int
    prompt: float
    answer: float
    answers: int


Made = dict[tuple[str, str], Table]  # (stage, file) -> what the stage will write


def table_of(one: Input, stage: Stage, made: Mapping[tuple[str, str], Table]) -> Table | None:
    """Return what is known of an input that is a table; None for the hub's, which is not asked, and built-in ones."""
    if one.source == "stage":
        return made.get((one.stage, one.name))
    if one.source != "here":
        return None
    try:
        return counted([dict(row) for row in iter_rows(one.name, field=one.setting, split=stage.config.split)])
    except DataError:
        if getattr(stage.config, "skip_bad_rows", False):
            return None
        raise


def counted(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Return the counts of rows with prompts, answers, pairs or rankings."""
    prompts, answers, total = 0, 0, 0
    for row in rows:
        prompts += size(row.get("prompt"))
        given = row.get("completions") or [row[name] for name in ("chosen", "rejected", "completion") if row.get(name)]
        given = given or [row[name] for name in ("messages", "text") if row.get(name)]
        answers += sum(map(size, given))
        total += len(given)
    count = max(1, len(rows))
    return Table(len(rows), prompts / count / CHARACTERS, answers / max(1, total) / CHARACTERS, total)


def size(value: Any) -> int:
    """Return the characters of a text or of the turns of a conversation."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, list | tuple):
        return sum(size(turn.get("content")) if isinstance(turn, Mapping) else size(turn) for turn in value)
    return 0 if value is None else len(json.dumps(value, default=str))


def will_make(stage: Stage, inputs: Sequence[Input], tables: Mapping[str, Table | None]) -> Made:
    """Return what a stage will write, as far as it can be known before it runs.

    Args:
        tables: {setting: what the stage reads}.
    """
    if stage.kind == "split" and all(one.source == "here" for one in inputs):
        files = plan_files(stage.config).files
        return {(stage.name, str(stage.folder / name)): counted(rows) for name, rows in files.items()}
    if stage.kind == "sample" and (prompts := tables.get("prompts")) is not None:
        rows = min(prompts.rows, stage.config.count or prompts.rows)
        sampling = stage.config.sampling
        answers = rows * sampling.samples_per_prompt
        found = Table(rows, prompts.prompt, float(sampling.max_new_tokens), answers)
        return {(stage.name, str(stage.output("samples"))): found}
    if stage.kind == "label" and (samples := tables.get("data")) is not None:
        return {(stage.name, str(stage.output("rankings"))): samples}
    return {}


def is_table(one: Input) -> bool:
    """Whether an input is a table and no model."""
    return one.setting in DATA


def described(one: Input, table: Table | None) -> str:
    """Return what is known of a table, in words."""
    if table is not None:
        of_answers = f", {table.answers:,} answers of about {table.answer:.0f} tokens" if table.answers else ""
        of_prompts = f", prompts of about {table.prompt:.0f} tokens" if table.prompt else ""
        return f"{table.rows:,} rows{of_prompts}{of_answers}"
    if one.source == "hub":
        return "on the hub: not counted"
    if one.source == "built-in":
        return "built-in" if one.name in BUILTIN_DATA else "built-in model"
    return f"made by stage {one.stage}" if one.source == "stage" else "not counted"
