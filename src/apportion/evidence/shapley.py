"""Shapley values of spans of the response under the reward model, within a budget of scored texts."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor

from apportion.errors import ConfigError, DataError
from apportion.evidence.ablated import score_ablated
from apportion.evidence.models import Models
from apportion.evidence.prefix import check_prompts
from apportion.evidence.shapley_values import max_players, shapley_values
from apportion.registry import EvidenceKey
from apportion.segments import check
from apportion.types import Rollouts

PARTS = ("values", "empty", "error", "calls", "joined")
SHAPLEY = frozenset(f"shapley_{part}" for part in PARTS)
ENDINGS = (".", "!", "?", "…", "。", "！", "？")


def shapley_evidence(models: Models, rollouts: Rollouts, needs: frozenset[str]) -> dict[str, Tensor]:
    """Return the needed ones of shapley_values (B,T) and shapley_empty, _error, _calls, _joined (B,), by settings.

    A span's value is spread evenly over its tokens. The settings are those of `credit.shapley`.

    Raises:
        ScoreError: a score is not finite, or a prompt is empty (the text of the empty coalition); it names the rollout.
        ConfigError: spans "segments" where `models` has no segmenter.
    """
    check_prompts(rollouts)
    evidence: dict[str, Tensor] = {}
    by_settings: dict[tuple[Any, ...], set[EvidenceKey]] = {}
    for key in map(EvidenceKey.of, needs):
        by_settings.setdefault(tuple(sorted(key.settings.items())), set()).add(key)
    for pairs, keys in by_settings.items():
        settings = {"spans": "sentences", "budget": 64, "seed": 0} | dict(pairs)
        rows = [_one(models, rollouts, row, settings) for row in range(len(rollouts))]
        parts = {f"shapley_{part}": torch.stack([r[i] for r in rows]) for i, part in enumerate(PARTS)}
        evidence |= {key: parts[key.name] for key in keys}
    return evidence


def _one(models: Models, rollouts: Rollouts, row: int, settings: dict[str, Any]) -> tuple[Tensor, ...]:
    """Return (values (T,), v(∅), largest standard error, texts scored, spans lost by joining) of one rollout."""
    spans = split_spans(models, rollouts, row, settings["spans"])
    count = int(spans.max()) + 1 if len(spans) else 0
    device, zero = rollouts.mask.device, torch.zeros((), device=rollouts.mask.device)
    if count == 0:
        return torch.zeros(rollouts.mask.shape[1], device=device), zero, zero, zero, zero
    players = min(count, max_players(settings["budget"]))
    spans = torch.where(spans >= 0, spans * players // count, -1)  # neighbouring spans are joined evenly
    sampled, valid = rollouts.mask[row], rollouts.valid[row]

    def value(coalitions: Tensor) -> Tensor:
        chosen = coalitions.to(device)[:, spans.clamp_min(0)] & sampled
        keep = chosen | (valid & ~sampled)
        return score_ablated(models.reward_model, rollouts, torch.full((len(keep),), row, device=device), keep)

    generator = seeded(settings["seed"], rollouts.response_ids[row][sampled])
    game = shapley_values(value, players, settings["budget"], generator)
    size = torch.bincount(spans[sampled], minlength=players)
    each = (game.values.to(device) / size)[spans.clamp_min(0)]
    totals = [game.empty, game.errors.max(), torch.tensor(float(game.calls)), torch.tensor(float(count - players))]
    return torch.where(sampled, each, 0.0), *(t.to(device) for t in totals)


def seeded(seed: int, ids: Tensor) -> torch.Generator:
    """Return a generator that depends only on `seed` and the tokens, not on the batch or the order of its rows."""
    digest = hashlib.blake2b(repr((seed, ids.tolist())).encode(), digest_size=7).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big"))


def split_spans(models: Models, rollouts: Rollouts, row: int, spans: str | int) -> Tensor:
    """Return span ids (T,) from 0 along one rollout's sampled tokens, -1 off the mask."""
    mask = rollouts.mask[row]
    order = mask.cumsum(dim=0) - 1
    if isinstance(spans, int):
        return torch.where(mask, order // spans, -1)
    if spans == "segments":
        if models.segment is None:
            fix = "Use spans: sentences, or give Models the segmenter of the run."
            raise ConfigError("shapley.spans", spans, "a run with segments", fix)
        try:
            return check(models.segment(rollouts.select(torch.tensor([row], device=mask.device))), mask[None])[0]
        except DataError as error:
            error.row = row
            raise
    decode = models.policy.tokenizer.decode
    texts = [decode([i]) for i in rollouts.response_ids[row][mask].tolist()]
    ends = torch.tensor([text.rstrip().endswith(ENDINGS) or "\n" in text for text in texts], device=mask.device)
    out = torch.full_like(order, -1)
    out[mask] = torch.nn.functional.pad(ends.cumsum(dim=0), (1, 0))[:-1] if len(ends) else order[mask]
    return out
