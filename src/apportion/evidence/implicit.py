"""One forward of a further language model, named by a setting: its log-probabilities of the sampled tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from apportion.errors import ModelError
from apportion.evidence.models import Models
from apportion.models.fast import has_fast_kernels
from apportion.models.loading import load_causal, locate
from apportion.models.policy import Policy, width_of
from apportion.models.tokenizers import load_tokenizer
from apportion.registry import EvidenceKey
from apportion.types import Rollouts


@torch.no_grad()
def implicit_evidence(models: Models, rollouts: Rollouts, needs: frozenset[str]) -> Mapping[str, Tensor]:
    """Return log-probabilities (B,T) of the sampled tokens, nats, under the model that each need names.

    Each model is loaded once, into `models.others`, and used with the policy's banned ids and temperature.

    Raises:
        ModelError: a model that cannot be loaded, or whose tokenizer is not the policy's.
    """
    logprobs = {}
    for need in sorted(needs):
        path = EvidenceKey.of(need).settings["model"]
        model = further_policy(models.policy, models.others, "implicit.model", path)
        logprobs[need] = model.forward(rollouts, values=False).logprobs
    return logprobs


def further_policy(policy: Policy, others: dict[str, Any], field: str, path: str) -> Policy:
    """Return the language model at `path` as a frozen policy without values, cached in `others`.

    Raises:
        ModelError: it cannot be loaded, or its tokenizer is not the policy's.
    """
    if path not in others:
        folder = locate(field, path)
        tokenizer = load_tokenizer(field, folder, policy.tokenizer.pad_token)
        if tokenizer.get_vocab() != policy.tokenizer.get_vocab():
            got = f"{path} with a different vocabulary of {len(tokenizer.get_vocab())} entries"
            fix = "Train it with DPO from the policy's own initial model."
            raise ModelError(field, got, "a model with the policy's tokenizer", fix)
        weights = next(policy.model.parameters())
        fast, rows = has_fast_kernels(policy.model), policy.pad + 1
        model: Any = load_causal(field, folder, weights.dtype, weights.device, fast_kernels=fast, rows=rows)
        banned = _banned(policy, field, path, width_of(model))
        others[path] = Policy(
            model.requires_grad_(False), policy.tokenizer, banned, temperature=policy.temperature, ends=policy.ends
        )
    cached = others[path]
    assert isinstance(cached, Policy)
    return cached


def _banned(policy: Policy, field: str, path: str, width: int) -> list[int]:
    """Return the policy's banned ids among `width` logits, and those beyond the policy's.

    Raises:
        ModelError: the policy samples ids for which there is no logit.
    """
    own = width_of(policy.model)
    if set(range(width, own)) - set(policy.banned):
        got = f"{path} with {width} logits, and a policy with {own}"
        fix = "Train it with DPO from the policy's own initial model."
        raise ModelError(field, got, "a logit for every token of the policy", fix)
    return [i for i in policy.banned if i < width] + list(range(own, width))
