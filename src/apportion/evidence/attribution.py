"""One forward and one backward of the reward model: the first-order effect of each response token on the score."""

from __future__ import annotations

import torch
from torch import Tensor

from apportion.errors import ScoreError
from apportion.evidence.prefix import scores_from_logits
from apportion.evidence.text_reward import to_policy, translate
from apportion.masking import check_finite
from apportion.models.reward import RewardModel, is_decoder
from apportion.types import Rollouts


def attribution_evidence(reward: RewardModel, rollouts: Rollouts) -> dict[str, Tensor]:
    """Return {"reward_attribution": (B,T)} float32, signed: (e_t − e_null)·∂R/∂e_t, 0 where `valid` is False.

    e_t is the model's embedding of token t, e_null that of the pad token, R the score. Weights get no gradient. The
    attribution of a model with its own tokenizer is transferred to the policy's tokens by characters.

    Raises:
        ScoreError: a score or an attribution is not finite, or a text cannot be scored; it names the rollout.
    """
    if reward.text is None:
        return _attribute(reward, rollouts)
    translation = translate(reward, rollouts)
    return to_policy(_attribute(reward, translation.rollouts), translation)


def _attribute(reward: RewardModel, rollouts: Rollouts) -> dict[str, Tensor]:
    model, before = reward.model, rollouts.prompt_ids.shape[1]
    mask = torch.cat([rollouts.prompt_mask, rollouts.valid], dim=1)
    pad = model.config.get_text_config().pad_token_id
    ids = torch.cat([rollouts.prompt_ids, rollouts.response_ids], dim=1).masked_fill(~mask, pad)
    inputs: dict[str, Tensor] = {"input_ids": ids, "attention_mask": mask.long()}
    if is_decoder(model):
        inputs["position_ids"] = (mask.cumsum(dim=1) - 1).clamp_min(0)
    layer = model.get_input_embeddings()
    with torch.no_grad():
        null = layer(torch.full((1, 1), pad, dtype=ids.dtype, device=ids.device))
    leaves: list[Tensor] = []

    def detach(module: torch.nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        leaves.append(output.detach().requires_grad_())
        return leaves[-1]

    # ids are the input rather than embeddings, so that the model finds its pooled position itself
    handle = layer.register_forward_hook(detach)
    try:
        with torch.enable_grad():
            logits = model(**inputs).logits
            reward.scores_of(logits.detach())  # raises where a score is not finite
            (gradient,) = torch.autograd.grad(scores_from_logits(reward, logits).sum(), leaves[0])
    finally:
        handle.remove()
    effect = ((leaves[0].detach().float() - null.float()) * gradient.float()).sum(dim=-1)[:, before:]
    effect = torch.where(rollouts.valid, effect, 0.0)
    check_finite("attribution", effect, "Load the reward model in float32 (reward_dtype).", error=ScoreError)
    return {"reward_attribution": effect}
