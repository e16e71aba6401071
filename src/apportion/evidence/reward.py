"""One forward of the reward model: the score, and the attention of the position it is read from."""

from __future__ import annotations

import torch
from torch import Tensor

from apportion import registry
from apportion.credit._evidence import EVIDENCE, Reading, asked_reading
from apportion.errors import ScoreError
from apportion.evidence.prefix import GIVES, head_outputs, prefix_evidence
from apportion.evidence.text_reward import to_policy, translate
from apportion.masking import first_index, last_index
from apportion.models.reward import RewardModel, is_decoder
from apportion.models.shared_prompt import Shared, can_share, shared_prompts
from apportion.types import Rollouts


def reward_pass(reward: RewardModel, rollouts: Rollouts, wanted: frozenset[str]) -> dict[str, Tensor]:
    """Return what is wanted of: scores (B,), reward_attention (B,T) (head mean over response columns, unnormalised),
    prefix_scores (B,T) and prompt_score (B,), which a decoder's head gives in the same forward (a model with its own
    tokenizer reads each prefix).

    A model with its own tokenizer reads the rollouts' text; the attention on its tokens is then carried over to the
    policy's by characters, in its scale.

    "reward_attention" may be asked for with settings (`credit.reading.Reading`), in several ways at once: all are
    read from the same forward.

    Raises:
        ScoreError: a score is not finite, or the model pools it elsewhere than at the response's last token (a
            sampled pad id does that); it names the rollout.
        ModelError: the model's attention cannot be read, or it has no layer of an asked number.
    """
    if reward.text is None:
        return _read(reward, rollouts, wanted)
    translation = translate(reward, rollouts)
    found = to_policy(_read(reward, translation.rollouts, wanted - GIVES), translation)
    return found | prefix_evidence(reward, rollouts, [], wanted)  # its tokens end elsewhere: prefixes are texts


def _read(reward: RewardModel, rollouts: Rollouts, wanted: frozenset[str]) -> dict[str, Tensor]:
    """Return what is wanted, from one forward over ids in the reward model's own vocabulary."""
    ids = torch.cat([rollouts.prompt_ids, rollouts.response_ids], dim=1)
    mask = torch.cat([rollouts.prompt_mask, rollouts.valid], dim=1)
    asked = {name: asked_reading(name) for name in wanted if registry.asked(name)[0] == EVIDENCE}
    readings = list(asked.values())
    shared = None if wanted & GIVES else sharing(reward, rollouts, readings)
    with head_outputs(reward.model, bool(wanted & GIVES)) as caught:
        if shared is None:
            scores, rows, positions = reward.read(ids, mask, readings)
        else:
            scores, rows, positions = reward.read_shared(rollouts, shared, readings)
    # an encoder's first token is its score's position; without text (padded on the left) it is not to be had
    reads = first_index(mask) if reward.text is not None and not is_decoder(reward.model) else last_index(mask)
    elsewhere = positions != reads
    if elsewhere.any():
        at = int(elsewhere.nonzero()[0])
        expected = f"{int(reads[at])}, the last token of the response"
        fix = "The reward model's pad id stands in the response: give it a pad token that is never sampled."
        raise ScoreError("pooled position", int(positions[at]), expected, fix, row=at)
    found = {"scores": scores, **prefix_evidence(reward, rollouts, caught, wanted)}
    for name, row in zip(asked, rows, strict=True):
        found[name] = torch.where(rollouts.valid, row[:, rollouts.prompt_ids.shape[1] :], 0.0)
    return found


def sharing(reward: RewardModel, rollouts: Rollouts, readings: list[Reading]) -> Shared | None:
    """Return the distinct prompts of `rollouts` where the model can read each once and it pays."""
    able = reward.text is None and is_decoder(reward.model) and not any(one.rollout for one in readings)
    return shared_prompts(rollouts) if able and can_share(reward.model) else None
