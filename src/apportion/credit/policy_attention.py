"""ABC-D and ABC-D2: the score is spread in proportion to the policy's own attention (ablations of ABC)."""

from __future__ import annotations

import torch
from torch import Tensor

from apportion.credit._redistribute import redistributor
from apportion.errors import check_fraction, unknown_name
from apportion.types import Credit, Rollouts

VIEWS = ("mean", "last")


def policy_attention(*, mix: float = 0.8, view: str = "mean", shifted: bool = False) -> Credit:
    """Return r_t = β·α_t·Σr + (1−β)·r_t with α from the policy's last layer, averaged over heads.

    Args:
        mix: β in [0, 1].
        view: "mean" (ABC-D) averages the rows of all generation steps; "last" (ABC-D2) is the final step's row. The
            step that generates token t attends to tokens before t, so the last token has no share of its own.
        shifted: move every share one token to the right, as the authors' code does, so that the first token gets 0.
            For reproduction only.

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
        raw = rollouts.token_evidence(name, least=0.0)
        if shifted:
            raw = torch.nn.functional.pad(raw, (1, 0))[:, :-1]
        return torch.where(rollouts.mask, raw, 0.0)

    return redistributor(weights, mix=mix, needs=frozenset({name}), causal=False)
