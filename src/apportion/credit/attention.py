"""ABC: the score is spread in proportion to the reward model's own attention, by default that of its last layer."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from apportion.credit._attention_spec import Layers, attention_spec
from apportion.credit._redistribute import redistributor
from apportion.errors import ConfigError, check_fraction
from apportion.masking import normalise
from apportion.types import Credit, Rollouts


def attention(
    *,
    mix: float = 0.8,
    floor: float = 0.0,
    cap: float | None = None,
    exclude_self: bool = False,
    layers: Layers = "last",
    heads: str = "mean",
    rollout: bool = False,
) -> Credit:
    """Return attention-based credit, r_t = β·α_t·Σr + (1−β)·r_t with β = `mix`.

    α (B,T) is evidence "reward_attention" (the last layer's attention at the position where the reward model computes
    its score, averaged over heads), normalised over the response: no extra forward. α depends on the whole response,
    so the credit is not causal and its policy gradient is biased, though each row's return is kept.

    Args:
        mix: β in [0, 1]; 0 equals sparse bitwise, 0.8 is the authors' setting.
        floor: part in [0, 1] of the share that is spread uniformly, against attention sinks.
        cap: largest share of one token in (0, 1]; the excess goes to the others in proportion. A row too short for
            the cap (cap·n < 1) becomes uniform.
        exclude_self: exclude the attention of the position that reads the score to itself, where that is a response
            token (a decoder's last token; except in a one-token row). An encoder reads it at its first token, [CLS],
            and nothing is excluded.
        layers: "last" (the paper's), "all", a layer's number (−1 is the last) or several; these are averaged.
        heads: "mean" (the paper's) or "max", the maximum over the heads of each layer.
        rollout: use the attention rollout over all layers instead (Abnar & Zuidema 2020, arXiv 2005.00928). It costs
            about as much as the attention scores of a forward pass, O(T²); one row of a layer costs O(T).

    With other layers or heads, the rollout or exclude_self, the evidence is "reward_attention" with these settings.

    Raises:
        ConfigError: a setting outside its range.
        DataError: the evidence is absent, negative or not finite.

    Source: Chan et al. 2024 (arXiv 2402.00782), section 3.

    Assumes: tokens that the reward model attends to earned the score; nothing guarantees it.
    Use it when responses are long, the critic is weak, and `diagnose` shows that its gradient points the true way.
    """
    name = attention_spec(layers, heads, rollout, exclude_self).evidence
    check_fraction("attention.mix", mix)
    check_fraction("attention.floor", floor, "0 leaves attention as it is, 1 is uniform.")
    if cap is not None and (check_fraction("attention.cap", cap, "Use 0.2 for at most a fifth a token.") == 0.0):
        raise ConfigError("attention.cap", cap, "a number in (0, 1] or null", "Use 0.2 for a fifth a token.")

    def weights(rollouts: Rollouts) -> Tensor:
        raw = rollouts.token_evidence(name, least=0.0)
        if floor == 0.0 and cap is None:
            return raw
        share, _ = normalise(raw, rollouts.mask)
        flat = rollouts.mask / rollouts.mask.sum(dim=1, keepdim=True).clamp_min(1)
        share = (1.0 - floor) * share + floor * flat
        share = share if cap is None else capped(share, rollouts.mask, cap)
        return share * raw.sum(dim=1, keepdim=True)  # so that the metrics still show the mass on the response

    return redistributor(weights, mix=mix, needs=frozenset({name}), causal=False)


def capped(share: Tensor, mask: Tensor, cap: float) -> Tensor:
    """Return shares (B,T), summing to 1, none above max(`cap`, 1/n): the excess goes to the rest pro rata."""
    count = mask.sum(dim=1, keepdim=True).clamp_min(1)
    limit = (1.0 / count).clamp_min(cap)
    for _ in range(min(math.ceil(1.0 / cap), mask.shape[1])):  # each pass fixes one more token at the limit
        full = share >= limit
        left = 1.0 - torch.where(full, limit, 0.0).sum(dim=1, keepdim=True)
        rest = torch.where(full | ~mask, 0.0, share)
        room = rest.sum(dim=1, keepdim=True)
        # tokens without any weight share the excess evenly, when nothing else can take it
        even = (mask & ~full) / (mask & ~full).sum(dim=1, keepdim=True).clamp_min(1)
        rest = torch.where(room > 0, rest / room.clamp_min(1e-30), even) * left
        share = torch.where(mask, torch.where(full, limit, rest), 0.0)
    return share
