"""One forward and one backward of the reward model: what each response token adds to the score, to first order."""

from __future__ import annotations

import torch
from torch import Tensor

from apportion.errors import ScoreError
from apportion.evidence.prefix import every_position
from apportion.evidence.text_reward import to_policy, translate
from apportion.models.reward import RewardModel, is_decoder
from apportion.types import Rollouts


def attribution_pass(reward: RewardModel, rollouts: Rollouts) -> dict[str, Tensor]:
    """Return {"reward_attribution": (B,T)} float32, signed: (e_t − e_null)·∂R/∂e_t, 0 where `valid` is False.

    e_t is what the model's embedding layer gives for token t, e_null what it gives for the pad token, R the score.
    Weights get no gradient. What a model with its own tokenizer says of its tokens is carried over by characters.

    Raises:
        ScoreError: a score or an attribution is not finite, or a text cannot be read; it names the rollout.
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

    def cut(module: torch.nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        leaves.append(output.detach().requires_grad_())
        return leaves[-1]

    # ids go in rather than embeddings, so that the model finds its pooled position by itself
    handle = layer.register_forward_hook(cut)
    try:
        with torch.enable_grad():
            logits = model(**inputs).logits
            reward.difference(logits.detach())  # refuses what is not a number
            (gradient,) = torch.autograd.grad(every_position(reward, logits).sum(), leaves[0])
    finally:
        handle.remove()
    moved = ((leaves[0].detach().float() - null.float()) * gradient.float()).sum(dim=-1)[:, before:]
    found = torch.where(rollouts.valid, moved, 0.0)
    bad = ~torch.isfinite(found).all(dim=1)
    if bad.any():
        row = int(bad.nonzero()[0])
        fix = "Load the reward model in float32 (reward_dtype)."
        raise ScoreError("attribution", found[row].tolist(), "finite numbers", fix, row=row)
    return {"reward_attribution": found}
