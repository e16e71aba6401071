"""Scores of texts with tokens left out: what is left is moved together and read as a text of its own."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor

from apportion.errors import ScoreError
from apportion.models.reward import RewardModel

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
def score_kept(reward: RewardModel, ids: Tensor, keep: Tensor, owners: Tensor) -> Tensor:
    """Return R (N,) of each row of `ids` (N,K) with only the tokens in `keep` (N,K) bool, at least one a row.

    Rows are read in order of length, `ROWS_AT_ONCE` in a forward, padded on the right. `owners` (N,) int64 is the
    rollout that each row belongs to.

    Raises:
        ScoreError: a score is not finite; it names the rollout.
    """
    out = torch.zeros(len(ids), device=ids.device)
    for rows in keep.sum(dim=1).argsort(stable=True).split(ROWS_AT_ONCE):
        try:
            out[rows] = reward.score(*compact(ids[rows], keep[rows]))[0]
        except ScoreError as error:  # it counts the rows of this forward
            raise ScoreError(renamed(str(error), owners[rows].tolist())) from error
    return out


def renamed(text: str, owners: Sequence[int]) -> str:
    """Return an error's text with the row of a forward that it names replaced by the rollout that owns the row."""
    return re.sub(r"rollout (\d+)", lambda found: f"rollout {owners[int(found[1])]}", text, count=1)
