"""Scores of responses with tokens left out: what is left is moved together and read as a text of its own."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from apportion.errors import ScoreError
from apportion.evidence.text_reward import translate
from apportion.models.reward import RewardModel
from apportion.types import Rollouts

ROWS_AT_ONCE = 64


def compact(ids: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    """Return (ids, mask), both (N,K'), with the kept tokens of `ids` (N,K) moved to the left in their order.

    K' is the longest row. Positions then count kept tokens alone, as if the others had never been written.
    """
    order = (~keep).to(torch.uint8).argsort(dim=1, stable=True)
    width = int(keep.sum(dim=1).max()) if keep.numel() else 0
    order = order[:, :width]
    return ids.gather(1, order), keep.gather(1, order)


@torch.no_grad()
def score_kept(reward: RewardModel, rollouts: Rollouts, owners: Tensor, keep: Tensor) -> Tensor:
    """Return R (N,) of N versions of rollouts: `owners` (N,) int64 says of which, `keep` (N,T) what the response keeps.

    Rows are read in order of length, `ROWS_AT_ONCE` in a forward; a model with its own tokenizer reads their text.

    Raises:
        ScoreError: a score is not finite, or a text cannot be read; it names the rollout.
    """
    bare = replace(rollouts, evidence={})
    out = torch.zeros(len(owners), device=keep.device)
    lengths = rollouts.prompt_mask.sum(dim=1)[owners] + keep.sum(dim=1)
    for rows in lengths.argsort(stable=True).split(ROWS_AT_ONCE):
        some = replace(bare.select(owners[rows]), mask=keep[rows], valid=keep[rows])
        try:
            out[rows] = reward.score(*_as_read(reward, some))[0]
        except ScoreError as error:  # it counts the rows of this forward
            if error.row is not None:
                error.row = int(owners[rows][error.row])
            raise
    return out


def _as_read(reward: RewardModel, rollouts: Rollouts) -> tuple[Tensor, Tensor]:
    """Return (ids, mask), both (N,K'), as the model reads prompt and kept response."""
    if reward.text is not None:
        translated = translate(reward, rollouts).rollouts
        return translated.response_ids, translated.mask
    ids = torch.cat([rollouts.prompt_ids, rollouts.response_ids], dim=1)
    return compact(ids, torch.cat([rollouts.prompt_mask, rollouts.valid], dim=1))
