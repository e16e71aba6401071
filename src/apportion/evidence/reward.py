"""One forward of the reward model: the score, and the attention at the scored position."""

from __future__ import annotations

import torch
from torch import Tensor

from apportion.credit import REWARD_ATTENTION, AttentionSpec, requested_attention
from apportion.errors import ScoreError
from apportion.evidence.prefix import PREFIX, capture_head_outputs, prefix_evidence
from apportion.evidence.text_reward import to_policy, translate
from apportion.masking import first_index, last_index
from apportion.models.reward import RewardModel, is_decoder
from apportion.models.shared_prompt import Shared, can_share, shared_prompts
from apportion.registry import EvidenceKey
from apportion.types import Rollouts

REWARD = frozenset({"scores", REWARD_ATTENTION}) | PREFIX


def reward_evidence(reward: RewardModel, rollouts: Rollouts, needs: frozenset[str]) -> dict[str, Tensor]:
    """Return the needed ones of: scores (B,), reward_attention (B,T) (head mean over response columns, unnormalised),
    prefix_scores (B,T) and prompt_score (B,), which a decoder's head gives in the same forward (a model with its own
    tokenizer scores each prefix).

    A model with its own tokenizer scores the rollouts' text; the attention on its tokens is then transferred to the
    policy's by characters, in its scale.

    "reward_attention" may be needed with several settings (`credit.AttentionSpec`): all come from the same forward.

    Raises:
        ScoreError: a score is not finite, or the model pools it at another position than the response's last token
            (because of a sampled pad id); it names the rollout.
        ModelError: the model's attention cannot be captured, or it has no layer of a requested number.
    """
    if reward.text is None:
        return _score(reward, rollouts, needs)
    translation = translate(reward, rollouts)
    evidence = to_policy(_score(reward, translation.rollouts, needs - PREFIX), translation)
    return evidence | prefix_evidence(reward, rollouts, [], needs)  # token boundaries differ: prefixes are texts


def _score(reward: RewardModel, rollouts: Rollouts, needs: frozenset[str]) -> dict[str, Tensor]:
    """Return the needed evidence from one forward over ids in the reward model's own vocabulary."""
    ids = torch.cat([rollouts.prompt_ids, rollouts.response_ids], dim=1)
    mask = torch.cat([rollouts.prompt_mask, rollouts.valid], dim=1)
    attention = {n: requested_attention(n) for n in needs if EvidenceKey.of(n).name == REWARD_ATTENTION}
    specs = list(attention.values())
    shared = None if needs & PREFIX else sharing(reward, rollouts, specs)
    with capture_head_outputs(reward.model, bool(needs & PREFIX)) as captured:
        if shared is None:
            scores, rows, positions = reward.forward(ids, mask, specs)
        else:
            scores, rows, positions = reward.forward_shared(rollouts, shared, specs)
    # an encoder scores its first token; with ids that are padded on the left that position is not available
    expected_at = first_index(mask) if reward.text is not None and not is_decoder(reward.model) else last_index(mask)
    wrong = positions != expected_at
    if wrong.any():
        row = int(wrong.nonzero()[0])
        expected = f"{int(expected_at[row])}, the last token of the response"
        fix = "The reward model's pad id occurs in the response: give it a pad token that is never sampled."
        raise ScoreError("pooled position", int(positions[row]), expected, fix, row=row)
    evidence = {"scores": scores, **prefix_evidence(reward, rollouts, captured, needs)}
    for need, attended in zip(attention, rows, strict=True):
        evidence[need] = torch.where(rollouts.valid, attended[:, rollouts.prompt_ids.shape[1] :], 0.0)
    return evidence


def sharing(reward: RewardModel, rollouts: Rollouts, specs: list[AttentionSpec]) -> Shared | None:
    """Return the distinct prompts of `rollouts` where the model can compute each once and it saves time."""
    able = reward.text is None and is_decoder(reward.model) and not any(spec.rollout for spec in specs)
    return shared_prompts(rollouts) if able and can_share(reward.model) else None
