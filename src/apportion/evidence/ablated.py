"""Scores of responses with tokens removed: the remaining tokens are scored as a text of their own."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from apportion.errors import ScoreError
from apportion.evidence.text_reward import translate, with_suffix
from apportion.models.reward import RewardModel
from apportion.types import Rollouts

ROWS_AT_ONCE = 64


def compact(ids: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    """Return (ids, mask), both (N,K'), with the kept tokens of `ids` (N,K) moved to the left in their order.

    K' is the longest row. Positions then count only the kept tokens, as if the others had not been generated.
    """
    order = (~keep).to(torch.uint8).argsort(dim=1, stable=True)
    width = int(keep.sum(dim=1).max()) if keep.numel() else 0
    order = order[:, :width]
    return ids.gather(1, order), keep.gather(1, order)


@torch.no_grad()
def score_ablated(reward: RewardModel, rollouts: Rollouts, owners: Tensor, keep: Tensor) -> Tensor:
    """Return R (N,) of N ablated rollouts: the rows `owners` (N,) int64, with the response tokens `keep` (N,T).

    Rows are scored in order of length, `ROWS_AT_ONCE` a forward; a model with its own tokenizer scores their text.

    Raises:
        ScoreError: a score is not finite, or a text cannot be scored; it names the rollout.
    """
    plain = replace(rollouts, evidence={})
    out = torch.zeros(len(owners), device=keep.device)
    lengths = rollouts.prompt_mask.sum(dim=1)[owners] + keep.sum(dim=1)
    for rows in lengths.argsort(stable=True).split(ROWS_AT_ONCE):
        ablated = replace(plain.select(owners[rows]), mask=keep[rows], valid=keep[rows])
        try:
            out[rows] = reward.score(*_model_inputs(reward, ablated))[0]
        except ScoreError as error:  # its row is that of this forward
            if error.row is not None:
                error.row = int(owners[rows][error.row])
            raise
    return out


def _model_inputs(reward: RewardModel, rollouts: Rollouts) -> tuple[Tensor, Tensor]:
    """Return (ids, mask), both (N,K'), of prompt and kept response in the model's own tokens."""
    if reward.text is not None:
        translated = translate(reward, rollouts).rollouts
        return translated.response_ids, translated.mask
    return compact(*with_suffix(reward, rollouts))
