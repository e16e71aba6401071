"""The logged rollouts on the page: which are shown, and their data for the heat-map viewer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from apportion.report.style import finite, is_special, rounded, shown

STEPS = 40
ROWS = 6

# key in rollouts.jsonl -> name on the page, in the order of the computation
QUANTITIES = {
    "credit": "credit as trained",
    "kl": "KL",
    "reward": "reward",
    "value": "value",
    "advantage": "advantage",
}


def pack(
    prompt: str,
    tokens: Sequence[str],
    *,
    quantities: Mapping[str, object],
    methods: Mapping[str, object],
    score: float | None,
    **more: Any,
) -> dict[str, Any]:
    """Return one rollout for the viewer: tokens as displayed, and per-token values, one for each token."""
    length = len(tokens)
    return {
        "prompt": prompt,
        "tokens": [shown(token) for token in tokens],
        "special": [i for i, token in enumerate(tokens) if is_special(token)],
        "score": finite(score),
        "quantities": {QUANTITIES.get(k, k): _fit(v, length) for k, v in quantities.items() if rounded(v)},
        "methods": {str(k): _fit(v, length) for k, v in methods.items() if rounded(v)},
        **more,
    }


def logged(rows: Sequence[Mapping[str, Any]]) -> tuple[list[dict[str, Any]], str]:
    """Return the rollouts to show, grouped by step, and a sentence on how they were chosen.

    At most `STEPS` steps, evenly spaced with the first and the last among them, and at each the first `ROWS` rows.
    """
    by_step: dict[int, list[Mapping[str, Any]]] = {}
    usable = [row for row in rows if isinstance(row.get("tokens"), list) and row["tokens"]]
    for row in usable:
        by_step.setdefault(int(finite(row.get("step")) or 0), []).append(row)
    steps = _even(sorted(by_step), STEPS)
    chosen: list[dict[str, Any]] = [{"step": s, "rollouts": [_packed(row) for row in by_step[s][:ROWS]]} for s in steps]
    count = sum(min(ROWS, len(by_step[s])) for s in steps)
    how = "all of them" if count == len(usable) else f"steps evenly spaced, the first {ROWS} rows of each"
    note = f"{count} of {len(usable)} logged rollouts: {how}. None was chosen for its content."
    if len(usable) < len(rows):
        note += f" {len(rows) - len(usable)} without tokens are left out."
    return chosen, note


def _packed(row: Mapping[str, Any]) -> dict[str, Any]:
    methods = row.get("methods")
    return pack(
        str(row.get("prompt") or ""),
        [str(token) for token in row["tokens"]],
        quantities={key: row[key] for key in QUANTITIES if key in row},
        methods=methods if isinstance(methods, Mapping) else {},
        score=row.get("score"),
        row=int(finite(row.get("row")) or 0),
        ended=row.get("ended") is not False,
    )


def _fit(values: object, length: int) -> list[float | None]:
    numbers = rounded(values)[:length]
    return numbers + [None] * (length - len(numbers))


def _even(items: list[int], most: int) -> list[int]:
    if len(items) <= most:
        return items
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]
