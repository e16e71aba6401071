"""Samples before and after training on the same prompts, in file order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from apportion.report.read import RunData
from apportion.report.style import finite, number

SHOWN = 6
MORE = 18

Key = tuple[str, int]  # a prompt, and which occurrence of it in the file


def samples_html(runs: Sequence[RunData]) -> str:
    """Return the first samples of the runs, one block a prompt; empty where no run has samples."""
    tables = [_by_prompt(run) for run in runs]
    prompts = list(dict.fromkeys(key for table in tables for key in table))
    if not prompts:
        return ""
    blocks = [_block(key, runs, tables) for key in prompts[: SHOWN + MORE]]
    note = (
        f'<p class="note">The first {min(len(prompts), SHOWN + MORE)} of {len(prompts)} prompts in file order; '
        "none was chosen for its content. The prompt is in grey.</p>"
    )
    rest = ""
    if len(blocks) > SHOWN:
        rest = f"<details><summary>{len(blocks) - SHOWN} more</summary>{''.join(blocks[SHOWN:])}</details>"
    return note + "".join(blocks[:SHOWN]) + rest


def _by_prompt(run: RunData) -> dict[Key, Mapping[str, Any]]:
    table: dict[Key, Mapping[str, Any]] = {}
    times: dict[str, int] = {}
    for row in run.samples:
        prompt = str(row.get("prompt") or "")
        times[prompt] = times.get(prompt, 0) + 1
        table[prompt, times[prompt]] = row
    return table


def _block(key: Key, runs: Sequence[RunData], tables: Sequence[Mapping[Key, Mapping[str, Any]]]) -> str:
    prompt = key[0]
    rows = [(i, run, table[key]) for i, (run, table) in enumerate(zip(runs, tables, strict=True)) if key in table]
    shared = len({str(row.get("before") or "") for _, _, row in rows}) == 1
    cells = []
    seen: set[tuple[str, object, object]] = set()
    for i, run, row in rows:
        text = str(row.get("before") or "")
        start = (text, finite(row.get("reward_before")), finite(row.get("judge_before")))
        # Runs that start from one policy share their text before training: it is shown once.
        if start in seen:
            continue
        seen.add(start)
        cells.append(_cell("before", "" if shared else run.name, None if shared else i, prompt, text, row))
    cells += [_cell("after", run.name, i, prompt, str(row.get("after") or ""), row) for i, run, row in rows]
    return f'<article class="sample count-{len(cells)}">{"".join(cells)}</article>'


def _cell(kind: str, name: str, run: int | None, prompt: str, text: str, row: Mapping[str, Any]) -> str:
    facts = [("reward", row.get(f"reward_{kind}")), ("judge", row.get(f"judge_{kind}"))]
    if kind == "after":
        facts.append(("KL", row.get("kl")))
    details = "".join(
        f"<span>{label} <b>{number(value)}</b></span>" for label, v in facts if (value := finite(v)) is not None
    )
    continuation = text.removeprefix(prompt) if prompt else text
    dot = "" if run is None else '<i class="dot"></i>'
    title = kind.capitalize() + (" \u00b7 " if name else "") + dot + escape(name)
    classes = f"cell {kind}" + ("" if run is None else f" run-{run}")
    return (
        f'<div class="{classes}"><h4>{title}</h4><p class="facts">{details}</p>'
        f'<p class="model-text"><span class="prompt">{escape(prompt)}</span>{escape(continuation)}</p></div>'
    )
