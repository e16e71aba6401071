"""Draws three recorded responses as shaded tokens (credit) or as boxes around actions (segments), in SVG."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

import torch
from torch import Tensor

from apportion import Rollouts, credit, segments

WIDTH, LEFT, LINE, SIZE, CHAR = 860, 14, 30, 13, 7.9  # pixels; CHAR is a monospaced letter's width at SIZE
POSITIVE, NEGATIVE = (24, 120, 90), (196, 78, 60)


def rollouts(stored: Mapping[str, Any]) -> Rollouts:
    """Return the recorded responses as a batch with their evidence."""
    rows = stored["responses"]
    width = max(len(row["ids"]) for row in rows)

    def padded(values: list[list[Any]], fill: Any = 0) -> Tensor:
        return torch.tensor([list(v) + [fill] * (width - len(v)) for v in values])

    mask = padded([[True] * len(row["ids"]) for row in rows], False)
    evidence = {}
    for name in rows[0]["evidence"]:
        values = [row["evidence"][name] for row in rows]
        evidence[name] = padded(values) if isinstance(values[0], list) else torch.tensor(values)
    return Rollouts(
        prompt_ids=torch.zeros(len(rows), 1, dtype=torch.int64),
        prompt_mask=torch.ones(len(rows), 1, dtype=torch.bool),
        response_ids=padded([row["ids"] for row in rows]),
        mask=mask,
        logprobs=padded([row["logprobs"] for row in rows], 0.0),
        scores=torch.tensor([row["score"] for row in rows]),
        group=torch.arange(len(rows)),
        evidence=evidence,
    )


def credit_picture(stored: Mapping[str, Any], name: str) -> str | None:
    """Return the rewards of credit `name`, or None when the record does not hold what it needs."""
    method = credit.find(name)()
    batch = rollouts(stored)
    if method.needs - set(batch.evidence):
        return None
    rewards, _ = credit.apply(method, batch)
    top = float(rewards.abs().max().clamp_min(1e-9))
    shades = [[float(v) / top for v in row] for row in rewards]
    return _svg(stored, [[_colour(v) for v in row] for row in shades], None)


def segments_picture(stored: Mapping[str, Any], name: str) -> str | None:
    """Return the actions of segmenter `name` in alternating shades, or None when the record lacks what it needs."""
    method = segments.find(name)()
    batch = rollouts(stored)
    if method.needs - set(batch.evidence):
        return None
    ids = method(batch).tolist()
    shades = [["#dbe7f3" if i % 2 == 0 else "#f6e7cf" for i in row] for row in ids]
    return _svg(stored, shades, ids)


def _colour(share: float) -> str:
    """Return white to green (earned) or red (charged) for −1 … 1."""
    end = POSITIVE if share >= 0 else NEGATIVE
    weight = min(1.0, abs(share)) ** 0.7
    red, green, blue = (round(255 + (e - 255) * weight) for e in end)
    return f"#{red:02x}{green:02x}{blue:02x}"


def _svg(stored: Mapping[str, Any], fills: list[list[str]], ids: list[list[int]] | None) -> str:
    parts: list[str] = []
    y = 26
    for row, fill in zip(stored["responses"], fills, strict=True):
        head = f"{row['prompt'].strip()} …   score {row['score']:+.2f}"
        parts.append(f'<text x="{LEFT}" y="{y}" class="h">{escape(head)}</text>')
        y += LINE
        x = float(LEFT)
        for i, token in enumerate(row["tokens"]):
            shown = token.replace("\n", "⏎").replace(" ", "\u00a0")
            wide = max(1, len(shown)) * CHAR + 2
            if x + wide > WIDTH - LEFT:
                x, y = float(LEFT), y + LINE
            dark = ids is None and _dark(fill[i])
            parts.append(f'<rect x="{x:.1f}" y="{y - 17}" width="{wide:.1f}" height="23" fill="{fill[i]}"/>')
            colour = "#fff" if dark else "#1c2420"
            parts.append(f'<text x="{x + 1:.1f}" y="{y}" fill="{colour}">{escape(shown)}</text>')
            x += wide
        y += LINE + 10
    style = (
        f"text{{font:{SIZE}px ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}}.h{{font-weight:600;fill:#5b6660}}"
    )
    size = f'viewBox="0 0 {WIDTH} {y - 10}" width="{WIDTH}" height="{y - 10}"'
    back = f'<rect width="{WIDTH}" height="{y - 10}" fill="#ffffff"/>'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}><style>{style}</style>{back}{"".join(parts)}</svg>\n'


def _dark(colour: str) -> bool:
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return 0.3 * red + 0.59 * green + 0.11 * blue < 140
