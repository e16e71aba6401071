"""One forward of the reward model: the score, and the attention at the scored position."""

from __future__ import annotations

import torch
from torch import Tensor

from apportion.credit import REWARD_ATTENTION, AttentionSpec, requested_attention
from apportion.errors import ModelError
from apportion.evidence.prefix import PREFIX, capture_head_outputs, prefix_evidence, scores_tokens
from apportion.evidence.text_reward import to_policy, translate, with_suffix
from apportion.models.reward import RewardModel
from apportion.models.reward.reading import own_pad
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
    With `exclude_self` the column of the position that reads the score is 0 where it is a response token.

    Raises:
        ScoreError: a score is not finite, or the model pools it at another position than the response's last token
            (because of a sampled pad id); it names the rollout.
        ModelError: the model's attention cannot be captured, its score is pooled over positions, so that no row of
            attention explains it, or it has no layer of a requested number.
    """
    single = rollouts.valid.sum(dim=1) <= 1  # the only token of a response keeps its attention to itself
    if reward.text is None:
        return _score(reward, rollouts, needs, single)
    translation = translate(reward, rollouts)
    evidence = to_policy(_score(reward, translation.rollouts, needs - PREFIX, single), translation)
    return evidence | prefix_evidence(reward, rollouts, [], needs)  # token boundaries differ: prefixes are texts


def _score(reward: RewardModel, rollouts: Rollouts, needs: frozenset[str], single: Tensor) -> dict[str, Tensor]:
    """Return the needed evidence from one forward over ids in the reward model's own vocabulary."""
    ids, mask = with_suffix(reward, rollouts)
    attention = {n: requested_attention(n) for n in needs if EvidenceKey.of(n).name == REWARD_ATTENTION}
    if attention:
        check_attention(reward)
    specs = list(attention.values())
    shared = None if needs & PREFIX else sharing(reward, rollouts, specs)
    with capture_head_outputs(reward.model, bool(needs & PREFIX) and scores_tokens(reward, ids, mask)) as captured:
        if shared is None:
            scores, rows, positions = reward.forward(ids, mask, specs)
        else:
            scores, rows, positions = reward.forward_shared(rollouts, shared, specs)
    reward.check_positions(positions, mask)
    evidence = {"scores": scores, **prefix_evidence(reward, rollouts, captured, needs)}
    columns = torch.arange(ids.shape[1], device=ids.device)
    reader = (columns == positions[:, None]) & ~single[:, None]
    first, length = rollouts.prompt_ids.shape[1], rollouts.mask.shape[1]
    for (need, spec), attended in zip(attention.items(), rows, strict=True):
        kept = attended.masked_fill(reader, 0.0) if spec.exclude_self else attended
        evidence[need] = torch.where(rollouts.valid, kept[:, first : first + length], 0.0)
    return evidence


def check_attention(reward: RewardModel) -> None:
    """Raise ModelError for a model that does not read its score at one position: no row of attention explains it."""
    if reward.reading.place == "pooled":
        got = f"{type(reward.model).__name__}, whose score is pooled over positions"
        fix = "Use a credit that needs no attention, such as uniform, sparse or prefix_difference, with this model."
        raise ModelError("reward_attention", got, "a score that is read at one position", fix)


def sharing(reward: RewardModel, rollouts: Rollouts, specs: list[AttentionSpec]) -> Shared | None:
    """Return the distinct prompts of `rollouts` where the model can compute each once and it saves time."""
    reading, pad = reward.reading, own_pad(reward.model)
    able = reward.text is None and not reward.suffix and reading.decoder and reading.batched and reading.position_ids
    if not able or any(spec.rollout for spec in specs) or not can_share(reward.model):
        return None
    if pad is not None and not bool((rollouts.valid & (rollouts.response_ids != pad)).any(dim=1).all()):
        return None  # the score of such a response is read in its prompt
    return shared_prompts(rollouts)
