"""ABC-D and ABC-D2: the score is spread in proportion to the policy's own attention (ablations of ABC)."""

from __future__ import annotations

import torch
from torch import Tensor

from apportion.credit._redistribute import redistributor
from apportion.errors import check_fraction, unknown_name
from apportion.masking import previous
from apportion.types import Credit, Rollouts

VIEWS = ("mean", "last")


def policy_attention(*, mix: float = 0.8, view: str = "mean", shifted: bool = False) -> Credit:
    """Return r_t = β·α_t·Σr + (1−β)·r_t with α from the policy's last layer, averaged over heads.

    Args:
        mix: β in [0, 1].
        view: "mean" (ABC-D) averages the rows of all generation steps; "last" (ABC-D2) is the final step's row. The
            step that generates token t attends to tokens before t, so the last token has no share of its own.
        shifted: the authors' own weights, for reproduction only: with view "mean" the attention to a token is averaged
            over the steps after it, those that see it, and not over all; then every share moves to the next sampled
            token, so that the first one gets 0.

    Needs evidence "policy_attention_mean" or "policy_attention_last", (B,T). Not causal.

    Raises:
        ConfigError: `mix` outside [0, 1] or an unknown `view`.

    Source: Chan et al. 2024 (arXiv 2402.00782), ABC-D and ABC-D2.

    Assumes: the tokens that the policy attends to while generating are those that its response depends on.
    Use it for: an ablation of `attention`: it needs no attention from the reward model.
    """
    check_fraction("policy_attention.mix", mix)
    if view not in VIEWS:
        raise unknown_name("policy_attention.view", str(view), VIEWS)
    name = f"policy_attention_{view}"

    def weights(rollouts: Rollouts) -> Tensor:
        raw, mask = rollouts.token_evidence(name, least=0.0), rollouts.mask
        if shifted:
            raw = previous(raw if view == "last" else over_later_steps(raw, mask), mask)
        return torch.where(mask, raw, 0.0)

    return redistributor(weights, mix=mix, needs=frozenset({name}), causal=False)


def over_later_steps(mean: Tensor, mask: Tensor) -> Tensor:
    """Return attention (B,T) averaged over the steps after each token, from its mean over all steps of the row.

    The steps before a token and its own do not see it, so they added 0 to the mean.
    """
    steps = mask.sum(dim=1, keepdim=True)
    later = steps - mask.cumsum(dim=1)
    return mean * steps / later.clamp_min(1)
