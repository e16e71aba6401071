"""One forward and one backward of the reward model: the first-order effect of each response token on the score."""

from __future__ import annotations

import torch
from torch import Tensor

from apportion.errors import ModelError, ScoreError
from apportion.evidence.text_reward import to_policy, translate, with_suffix
from apportion.masking import check_finite
from apportion.models.reward import RewardModel
from apportion.models.reward.reading import fill_id, own_pad, pad_set_to
from apportion.models.text.render import embedding_count
from apportion.types import Rollouts


def attribution_evidence(reward: RewardModel, rollouts: Rollouts) -> dict[str, Tensor]:
    """Return {"reward_attribution": (B,T)} float32, signed: (e_t − e_null)·∂R/∂e_t, 0 where `valid` is False.

    e_t is the model's embedding of token t, e_null that of the pad token (without one that of EOS, or zeros), R the
    score. Weights get no gradient. The attribution of a model with its own tokenizer is transferred to the policy's
    tokens by characters.

    Raises:
        ScoreError: a score or an attribution is not finite, or a text cannot be scored; it names the rollout.
    """
    translation = translate(reward, rollouts) if reward.text is not None else None
    own = rollouts if translation is None else translation.rollouts
    first, length = own.prompt_ids.shape[1], own.mask.shape[1]
    effect = _attribute(reward, *with_suffix(reward, own))[:, first : first + length]
    effect = torch.where(own.valid, effect, 0.0)
    check_finite("attribution", effect, "Load the reward model in float32 (reward_dtype).", error=ScoreError)
    found = {"reward_attribution": effect}
    return found if translation is None else to_policy(found, translation)


def _attribute(reward: RewardModel, ids: Tensor, mask: Tensor) -> Tensor:
    """Return the effect (B,K) of each of ids (B,K), undefined off mask (B,K)."""
    if reward.reads_alone(ids, mask):
        return _each_alone(reward, ids, mask)
    model = reward.model
    fill = fill_id(model, ids, mask)
    ids, inputs = reward.inputs(ids, mask)
    layer = model.get_input_embeddings()
    leaves: list[Tensor] = []

    def detach(module: torch.nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if not isinstance(output, Tensor):
            got = f"{type(model).__name__}, whose embeddings are not one tensor"
            fix = "Use a credit that needs no attribution, such as prefix_difference, with this model."
            raise ModelError("reward_attribution", got, "a model with plain embeddings", fix)
        leaves.append(output.detach().requires_grad_())
        return leaves[-1]

    # ids are the input rather than embeddings, so that the model finds its pooled position itself
    handle = layer.register_forward_hook(detach)
    try:
        with torch.enable_grad(), pad_set_to(model, fill):
            logits = model(**inputs).logits
            reward.scores_of(logits.detach())  # raises where a score is not finite
            (gradient,) = torch.autograd.grad(reward.unchecked_scores(logits).sum(), leaves[0])
    finally:
        handle.remove()
    return ((leaves[0].detach().float() - _null(reward).float()) * gradient.float()).sum(dim=-1)


def _null(reward: RewardModel) -> Tensor:
    """Return the embedding (1,1,d) of the model's pad token, else its tokenizer's pad or EOS token, else zeros."""
    layer = reward.model.get_input_embeddings()
    named = (getattr(reward.tokenizer, name, None) for name in ("pad_token_id", "eos_token_id"))
    known = (i for i in (own_pad(reward.model), *named) if i is not None and i < embedding_count(reward.model))
    token = next(known, None)
    device = layer.weight.device
    with torch.no_grad():
        null: Tensor = layer(torch.full((1, 1), token or 0, dtype=torch.int64, device=device))
    return null if token is not None else torch.zeros_like(null)


def _each_alone(reward: RewardModel, ids: Tensor, mask: Tensor) -> Tensor:
    effect = torch.zeros(ids.shape, device=ids.device)
    for row in range(len(ids)):
        alone = ids[row][mask[row]][None]
        try:
            effect[row][mask[row]] = _attribute(reward, alone, torch.ones_like(alone, dtype=torch.bool))[0]
        except ScoreError as error:
            error.row = row
            raise
    return effect
