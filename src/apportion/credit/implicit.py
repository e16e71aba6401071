"""Implicit reward: each token earns the clipped log-ratio of a DPO-trained model to the reference."""

from __future__ import annotations

import torch
from torch import Tensor

from apportion import registry
from apportion.credit._evidence import check_number, token_evidence
from apportion.errors import ConfigError
from apportion.types import Credit, Rollouts, State


def implicit(*, coef: float = 0.05, clip: float | None = 0.05, model: str | None = None) -> Credit:
    """Return r_t + clip(β₁·(log π_DPO(a_t) − log π_ref(a_t)), ±`clip`) with β₁ = `coef`.

    The rewards that come in stay (the score on the last token), and a `kl_penalty` may follow. It does not keep the
    return: it **changes the objective**, and the score no longer says whether it worked; judge it by something else.

    Args:
        coef: β₁ >= 0; 0 is sparse.
        clip: bound > 0 of one token's part, in units of the score; None leaves it unbounded.
        model: folder or hub id of a language model that DPO trained from the reference, with the policy's tokenizer.
            It is read in one further forward a batch. None is for a caller who brings the evidence.

    Needs evidence "implicit_logprobs" (made with `model`) and "reference_logprobs", both (B,T) in nats. Causal.

    Raises:
        ConfigError: a setting outside its range.
        DataError: evidence absent, of the wrong shape or not finite.

    Source: Zhong et al. 2024, RTO (arXiv 2404.18922), eq. for r_t with β₁, β₂ (our `kl_penalty.coef`).

    Assumes: the model that DPO trained ranks tokens as people would.
    Use it when preference pairs are to be had beside the reward model; judge the result by something other than the
    score.
    """
    check_number("implicit.coef", coef, 0.0)
    if clip is not None:
        check_number("implicit.clip", clip, 1e-12, "Use null for no bound.")
    if model is not None and (not isinstance(model, str) or not model.strip()):
        raise ConfigError("implicit.model", model, "a folder or hub id", "Point to the model DPO trained.")
    name = registry.ask("implicit_logprobs", **({} if model is None else {"model": model}))

    def parts(rollouts: Rollouts) -> tuple[Tensor, Tensor]:
        """Return (what each token gets, whether it was clipped), both (B,T)."""
        raw = coef * (token_evidence(rollouts, name) - token_evidence(rollouts, "reference_logprobs"))
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
