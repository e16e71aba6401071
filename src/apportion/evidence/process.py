"""User-supplied process rewards: lists of numbers, one a token or a step, validated and padded to (B,T)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from apportion import registry
from apportion.errors import ConfigError, DataError, ScoreError
from apportion.evidence.models import Models
from apportion.registry import EvidenceKey
from apportion.segments import check
from apportion.types import Rollouts


def process_evidence(models: Models, rollouts: Rollouts, needs: frozenset[str]) -> dict[str, Tensor]:
    """Return the process rewards (B,T) of the function that each need names.

    A function is called with (texts, rollouts, prompts), lists of the B rollouts' decoded responses and prompts.

    Raises:
        ConfigError: rewards of steps where `models` has no segmenter.
        DataError: another number of rows than rollouts. ScoreError: a row of the wrong length, or with something that
            is not a finite number; it names the rollout.
        UserCodeError: the function raised, or took longer than `monitors.timeout`.
    """
    decode = models.policy.tokenizer.decode
    pairs = zip(rollouts.response_ids, rollouts.mask, strict=True)
    texts = [decode(ids[mask]) for ids, mask in pairs]
    prompts = [decode(ids[mask]) for ids, mask in zip(rollouts.prompt_ids, rollouts.prompt_mask, strict=True)]
    rewards = {}
    for need in sorted(needs):
        settings = EvidenceKey.of(need).settings
        function = registry.find("process.function", settings["function"], {})
        segments = None
        if settings.get("unit") == "step":
            if models.segment is None:
                fix = "Use unit: token, or give Models the segmenter of the run."
                raise ConfigError("process.unit", "step", "a run with segments", fix)
            segments = check(models.segment(rollouts), rollouts.mask)
        rows = models.user_code.call(settings["function"], function, texts, rollouts, prompts)
        rewards[need] = to_tokens(rows, rollouts.mask, segments, settings["function"])
    return rewards


def to_tokens(rows: Any, mask: Tensor, segments: Tensor | None, source: str) -> Tensor:
    """Return (B,T) float32 with the numbers in `rows`, B lists, on the tokens of `mask` (B,T) that they belong to.

    Args:
        rows: lists of one number a token of the row, or, with `segments` (B,T) ids, one a segment, which falls on the
            segment's last token; or rows of pairs (token, number), the token counted among the row's own.
        source: the name used in errors.

    Raises:
        DataError, ScoreError: as `process_evidence`.
    """
    rows = rows.tolist() if isinstance(rows, Tensor) else rows
    if not _is_list(rows) or len(rows) != len(mask):
        got = f"{len(rows)} rows" if _is_list(rows) else type(rows).__name__
        raise DataError(f"the result of {source}", got, f"a list of {len(mask)} rows", "One a rollout.")
    out = torch.zeros(mask.shape, device=mask.device)
    for row, given in enumerate(rows):
        field = f"process rewards from {source}"
        if not _is_list(given):
            raise ScoreError(field, given, "a list of numbers", "Return one list a rollout.", row=row)
        places = mask[row].nonzero()[:, 0]
        if segments is not None:
            places = _last_of_each(segments[row], places)
        marked = len(given) > 0 and all(_is_list(item) for item in given)
        spots, numbers = _pairs(given, mask[row].nonzero()[:, 0], field, row) if marked else (places, list(given))
        if len(numbers) != len(spots):
            unit = "token" if segments is None else "step"
            expected = f"{len(spots)} numbers, one a {unit}"
            raise ScoreError(
                field, f"{len(numbers)} numbers", expected, "Count the sampled tokens, EOS included.", row=row
            )
        out[row, spots] = torch.tensor(
            [_number(field, row, i, value) for i, value in enumerate(numbers)], device=out.device
        )
    return out


def _is_list(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))


def _number(field: str, row: int, place: int, value: object) -> float:
    value = value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
    if not isinstance(value, Real) or not math.isfinite(value):
        fix = "A failure never becomes a reward: return a number for it, or raise an error."
        raise ScoreError(f"{field}, number {place}", value, "a finite number", fix, row=row)
    return float(value)


def _last_of_each(ids: Tensor, places: Tensor) -> Tensor:
    """Return (S,) where each segment of one row's `ids` (T,) ends."""
    on = ids[places]
    ends = torch.ones_like(on, dtype=torch.bool)
    ends[:-1] = on[1:] != on[:-1]
    return places[ends]


def _pairs(given: Sequence[Any], places: Tensor, field: str, row: int) -> tuple[Tensor, list[Any]]:
    """Return (positions, numbers) of pairs (token, number), the tokens rising. Raises ScoreError for other ones."""
    tokens = [item[0] if len(item) == 2 else None for item in given]
    least = -1
    for place, token in enumerate(tokens):
        if not isinstance(token, int) or isinstance(token, bool) or not least < token < len(places):
            expected = f"pairs (token, number), tokens rising and below {len(places)}"
            raise ScoreError(f"{field}, pair {place}", given[place], expected, "Count from 0 in each row.", row=row)
        least = token
    return places[torch.tensor(tokens, device=places.device)], [item[1] for item in given]
