"""One forward of the reward model: the score, and the attention of the position it is read from."""

from __future__ import annotations

import torch
from torch import Tensor

from apportion.errors import ScoreError, message
from apportion.evidence.prefix_pass import GIVES, head_outputs, prefix_evidence
from apportion.masking import last_index
from apportion.models.reward import RewardModel
from apportion.types import Rollouts


def reward_pass(reward: RewardModel, rollouts: Rollouts, wanted: frozenset[str]) -> dict[str, Tensor]:
    """Return what is wanted of: scores (B,), reward_attention (B,T) (head mean over response columns, unnormalised),
    prefix_scores (B,T) and prompt_score (B,), which a decoder's head gives in the same forward.

    Raises:
        ScoreError: a score is not finite, or the model pools it elsewhere than at the response's last token (a
            sampled pad id does that); it names the rollout.
    """
    ids = torch.cat([rollouts.prompt_ids, rollouts.response_ids], dim=1)
    mask = torch.cat([rollouts.prompt_mask, rollouts.valid], dim=1)
    with head_outputs(reward.model, bool(wanted & GIVES)) as caught:
        scores, row, positions = reward.score(ids, mask, attention="reward_attention" in wanted)
    elsewhere = positions != last_index(mask)
    if elsewhere.any():
        at = int(elsewhere.nonzero()[0])
        expected = f"{int(last_index(mask)[at])}, the last token of the response"
        mend = "The reward model's pad id stands in the response: give it a pad token that is never sampled."
        raise ScoreError(message(f"pooled position of rollout {at}", int(positions[at]), expected, mend))
    found = {"scores": scores, **prefix_evidence(reward, rollouts, caught, wanted)}
    if row is not None:
        found["reward_attention"] = torch.where(rollouts.valid, row[:, rollouts.prompt_ids.shape[1] :], 0.0)
    return found
