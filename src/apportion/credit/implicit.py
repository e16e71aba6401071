"""Implicit reward: each token earns the clipped log-ratio of a DPO-trained model to the reference."""

from __future__ import annotations

import torch
from torch import Tensor

from apportion.errors import ConfigError, check_number
from apportion.registry import EvidenceKey
from apportion.types import Credit, Rollouts, State


def implicit(*, coef: float = 0.05, clip: float | None = 0.05, model: str | None = None) -> Credit:
    """Return r_t + clip(β₁·(log π_DPO(a_t) − log π_ref(a_t)), ±`clip`) with β₁ = `coef`.

    The input rewards are kept (the score on the last token), and a `kl_penalty` may follow. It does not keep the
    return: it **changes the objective**, so the score no longer measures success; evaluate it by something else.

    Args:
        coef: β₁ >= 0; 0 is sparse.
        clip: bound > 0 on one token's part, in units of the score; None leaves it unbounded.
        model: folder or hub id of a language model that DPO trained from the reference, with the policy's tokenizer.
            It costs one further forward a batch. None is for a caller who supplies the evidence.

    Needs evidence "implicit_logprobs" (made with `model`) and "reference_logprobs", both (B,T) in nats. Causal.

    Raises:
        ConfigError: a setting outside its range.
        DataError: evidence absent, of the wrong shape or not finite.

    Source: Zhong et al. 2024, RTO (arXiv 2404.18922), eq. for r_t with β₁, β₂ (our `kl_penalty.coef`).

    Assumes: the model that DPO trained ranks tokens as people would.
    Use it when preference pairs are available beside the reward model; evaluate the result by something other than
    the score.
    """
    check_number("implicit.coef", coef, 0.0)
    if clip is not None:
        check_number("implicit.clip", clip, 1e-12, "Use null for no bound.")
    if model is not None and (not isinstance(model, str) or not model.strip()):
        raise ConfigError("implicit.model", model, "a folder or hub id", "Point to the model DPO trained.")
    name = EvidenceKey("implicit_logprobs", **({} if model is None else {"model": model}))

    def parts(rollouts: Rollouts) -> tuple[Tensor, Tensor]:
        """Return (each token's part, whether it was clipped), both (B,T)."""
        raw = coef * (rollouts.token_evidence(name) - rollouts.token_evidence("reference_logprobs"))
        bounded = raw if clip is None else raw.clamp(-clip, clip)
        return bounded, bounded != raw

    def assign(rollouts: Rollouts, rewards: Tensor, state: State) -> tuple[Tensor, State]:
        return torch.where(rollouts.mask, rewards.float() + parts(rollouts)[0], 0.0).to(rewards.dtype), state

    def stats(rollouts: Rollouts, before: Tensor, after: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        paid, clipped = parts(rollouts)
        return {
            "credit/implicit": (paid.sum(), rollouts.mask.any(dim=1).sum().float()),
            "credit/implicit_clipfrac": (clipped.sum().float(), rollouts.mask.sum().float()),
        }

    needs = frozenset({name, "reference_logprobs"})
    return Credit(dict, assign, needs, keeps_return=False, causal=True, stats=stats)
