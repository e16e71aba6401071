"""The reward model as a game over spans of the response: Shapley values of the spans within a budget of readings."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from apportion import registry
from apportion.errors import ConfigError, DataError
from apportion.evidence.ablated import score_kept
from apportion.evidence.prefix import check_prompts
from apportion.evidence.shapley_values import most_players, shapley_values
from apportion.segments import check
from apportion.types import Rollouts

if TYPE_CHECKING:
    from apportion.evidence import Models

PARTS = ("values", "empty", "error", "calls", "joined")
ENDINGS = (".", "!", "?", "…", "。", "！", "？")


def shapley_pass(models: Models, rollouts: Rollouts, wanted: frozenset[str]) -> dict[str, Tensor]:
    """Return what is wanted of shapley_values (B,T) and shapley_empty, _error, _calls, _joined (B,), by their settings.

    A span's value is spread evenly over its tokens. The settings are those of `credit.shapley`.

    Raises:
        ScoreError: a score is not finite, or a prompt is empty (it is what the empty coalition reads); it names the
            rollout. ConfigError: spans that are the run's segments where these are not known.
    """
    check_prompts(rollouts)
    found: dict[str, Tensor] = {}
    by_settings: dict[str, set[str]] = {}
    for name in wanted:
        by_settings.setdefault(name.partition("@")[2], set()).add(name)
    for names in by_settings.values():
        settings = {"spans": "sentences", "budget": 64, "seed": 0} | registry.asked(min(names))[1]
        rows = [_one(models, rollouts, row, settings) for row in range(len(rollouts))]
        made = {part: torch.stack([r[i] for r in rows]) for i, part in enumerate(PARTS)}
        found |= {name: made[registry.asked(name)[0].removeprefix("shapley_")] for name in names}
    return found


def _one(models: Models, rollouts: Rollouts, row: int, settings: dict[str, Any]) -> tuple[Tensor, ...]:
    """Return (values (T,), v(∅), largest standard error, texts read, spans joined away) of one rollout."""
    spans = cut(models, rollouts, row, settings["spans"])
    count = int(spans.max()) + 1 if len(spans) else 0
    device, zero = rollouts.mask.device, torch.zeros((), device=rollouts.mask.device)
    if count == 0:
        return torch.zeros(rollouts.mask.shape[1], device=device), zero, zero, zero, zero
    players = min(count, most_players(settings["budget"]))
    spans = torch.where(spans >= 0, spans * players // count, -1)  # neighbours are joined, as evenly as may be
    sampled, read = rollouts.mask[row], rollouts.valid[row]

    def value(coalitions: Tensor) -> Tensor:
        chosen = coalitions.to(device)[:, spans.clamp_min(0)] & sampled
        keep = chosen | (read & ~sampled)
        return score_kept(models.reward, rollouts, torch.full((len(keep),), row, device=device), keep)

    generator = seeded(settings["seed"], rollouts.response_ids[row][sampled])
    game = shapley_values(value, players, settings["budget"], generator)
    size = torch.bincount(spans[sampled], minlength=players)
    each = (game.values.to(device) / size)[spans.clamp_min(0)]
    told = [game.empty, game.errors.max(), torch.tensor(float(game.calls)), torch.tensor(float(count - players))]
    return torch.where(sampled, each, 0.0), *(t.to(device) for t in told)


def seeded(seed: int, ids: Tensor) -> torch.Generator:
    """Return a generator that depends on `seed` and the tokens alone: not on the batch or the order of its rows."""
    digest = hashlib.blake2b(repr((seed, ids.tolist())).encode(), digest_size=7).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big"))


def cut(models: Models, rollouts: Rollouts, row: int, spans: str | int) -> Tensor:
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
