"""The configurations of the runs: a table of differences, and each config.yaml."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

import yaml

from apportion.report.read import RunData


def settings_html(runs: Sequence[RunData]) -> str:
    """Return a table of the settings that differ between runs of one stage, and each config.yaml in a details."""
    parts = [_differences(group) for group in _stages(runs)]
    for run in runs:
        text = escape(run.config_text) or "config.yaml is absent from this run folder."
        parts.append(f"<details><summary>{escape(run.name)}</summary><pre>{text}</pre></details>")
    return "".join(parts)


def flatten(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, value) for every leaf of a nested mapping; lists count as leaves."""
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _plain(value: object) -> str:
    if isinstance(value, list | dict):
        return yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=10_000).strip()
    return "\u2013" if value is None else str(value)


def _stages(runs: Sequence[RunData]) -> list[list[tuple[int, RunData]]]:
    groups: dict[str, list[tuple[int, RunData]]] = {}
    for i, run in enumerate(runs):
        if run.config:
            groups.setdefault(run.stage, []).append((i, run))
    return [group for group in groups.values() if len(group) > 1]


def _differences(group: list[tuple[int, RunData]]) -> str:
    flat = [dict(flatten(run.config)) for _, run in group]
    keys = list(dict.fromkeys(key for values in flat for key in values))
    differing = [key for key in keys if len({repr(values.get(key)) for values in flat}) > 1]
    stage = escape(group[0][1].stage or "these")
    if not differing:
        return f'<p class="note">The {stage} runs have the same settings.</p>'
    heads = "".join(f'<th class="run-{i}"><i class="dot"></i>{escape(run.name)}</th>' for i, run in group)
    rows = "".join(
        f"<tr><th>{escape(key)}</th>{''.join(f'<td>{escape(_plain(v.get(key)))}</td>' for v in flat)}</tr>"
        for key in differing
    )
    caption = f"<caption>Settings that differ between the {stage} runs</caption>"
    return f'<div class="scroll"><table class="words">{caption}<tr><td></td>{heads}</tr>{rows}</table></div>'
