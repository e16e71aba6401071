"""One forward of a further language model, which a setting names: its log-probabilities of the sampled tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from apportion import registry
from apportion.errors import ModelError
from apportion.models.loading import load_causal, load_tokenizer, locate
from apportion.models.policy import Policy
from apportion.types import Rollouts

if TYPE_CHECKING:
    from apportion.evidence import Models


@torch.no_grad()
def implicit_pass(models: Models, rollouts: Rollouts, wanted: frozenset[str]) -> Mapping[str, Tensor]:
    """Return log-probabilities (B,T) of the sampled tokens, nats, under the model that each wanted name asks for.

    Each model is loaded once, into `models.others`, and read as the policy is: same banned ids, same temperature.

    Raises:
        ModelError: a model that cannot be loaded, or whose tokenizer is not the policy's.
    """
    found = {}
    for name in sorted(wanted):
        model = further_policy(models.policy, models.others, "implicit.model", registry.asked(name)[1]["model"])
        found[name] = model.forward(rollouts, values=False).logprobs
    return found


def further_policy(policy: Policy, others: dict[str, Any], field: str, path: str) -> Policy:
    """Return the language model at `path` as a frozen policy without values, loaded into `others` at first.

    Raises:
        ModelError: it cannot be loaded, or its tokenizer is not the policy's.
    """
    if path not in others:
        folder = locate(field, path)
        tokenizer = load_tokenizer(field, folder, policy.tokenizer.pad_token)
        if tokenizer.get_vocab() != policy.tokenizer.get_vocab():
            got = f"{path}, whose vocabulary of {len(tokenizer.get_vocab())} entries is another"
            fix = "Train it with DPO from the policy's own start."
            raise ModelError(field, got, "a model with the policy's tokenizer", fix)
        weights = next(policy.model.parameters())
        model = load_causal(field, folder, weights.dtype, weights.device).requires_grad_(False)
        others[path] = Policy(model, policy.tokenizer, policy.banned, temperature=policy.temperature)
    kept = others[path]
    assert isinstance(kept, Policy)
    return kept
