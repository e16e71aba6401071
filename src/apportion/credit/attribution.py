"""Attribution: the score is spread by each token's signed first-order effect on it."""

from __future__ import annotations

import torch
from torch import Tensor

from apportion.credit._redistribute import redistributor, share_stats
from apportion.errors import check_flag, check_fraction
from apportion.types import Credit, Rollouts, State


def attribution(*, mix: float = 0.8, signed: bool = True) -> Credit:
    """Return credit by a_t = (e_t − e_null)·∂R/∂e_t, the first-order effect of token t on the score. With `signed`

        r_t = (1−β)·r_t + β·(S/n + |S|·(a_t − ā)/Σ|a|)

    S the row's rewards, n its tokens, ā the mean of a over them, β = `mix`. The deviations sum to 0, so each row keeps
    its sum; a token that raised the score never gets less than one that lowered it, whatever the sign of S; no token
    gets more than |S|·(1 + 2/n). Where every a_t has the sign of S it is S·a_t/Σa, as for attention. The scale of a
    does not matter, so a score may be centred and scaled. (Dividing by Σa instead would flip the signs where Σa and S
    disagree, and is unbounded where Σa is near 0.) A row with Σ|a| ≈ 0 becomes uniform and is counted.

    Args:
        mix: β in [0, 1]; 0 equals sparse bitwise.
        signed: False spreads by |a_t|/Σ|a| instead, as attention does, and has a `share`.

    Needs evidence "reward_attribution" (B,T) of any sign: one forward and one backward of the reward model. a
    depends on the whole response, so the credit is not causal and its policy gradient is biased.

    Raises:
        ConfigError: a setting outside its range. DataError: evidence absent, of the wrong shape or not finite.

    Sources: gradient × input (Shrikumar et al. 2017, arXiv 1704.02685); signed credit from attributions 2025
    (arXiv 2504.16272).

    Assumes: the score is nearly linear between a token and the pad token.
    Use it when signed credit is wanted and a backward pass of the reward model is affordable.
    """
    check_fraction("attribution.mix", mix)
    check_flag("attribution.signed", signed)
    needs = frozenset({"reward_attribution"})

    def sizes(rollouts: Rollouts) -> Tensor:
        return rollouts.token_evidence("reward_attribution").abs()

    if not signed:
        return redistributor(sizes, mix=mix, needs=needs, causal=False)

    def assign(rollouts: Rollouts, rewards: Tensor, state: State) -> tuple[Tensor, State]:
        deviations, flat = _deviations(rollouts)
        if mix == 0.0:  # bitwise the input rewards
            return torch.where(rollouts.mask, rewards, 0), state
        r = torch.where(rollouts.mask, rewards.float(), 0.0)
        total = r.sum(dim=1, keepdim=True)
        return ((1.0 - mix) * r + mix * (total * flat + total.abs() * deviations)).to(rewards.dtype), state

    def stats(rollouts: Rollouts, before: Tensor, after: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        raw, size = rollouts.token_evidence("reward_attribution"), sizes(rollouts)
        counted = share_stats(size, rollouts.mask)
        against = (raw.sign() * before.float().where(rollouts.mask, 0.0).sum(dim=1, keepdim=True).sign()) < 0
        return counted | {"credit/against_rate": (against.sum().float(), rollouts.mask.sum().float())}

    return Credit(dict, assign, needs, keeps_return=True, causal=False, stats=stats, redistributes=True)


def _deviations(rollouts: Rollouts) -> tuple[Tensor, Tensor]:
    """Return ((a_t − ā)/Σ|a|, 1/n), both (B,T) and 0 off the mask; the first is 0 where there is no attribution."""
    mask, raw = rollouts.mask, rollouts.token_evidence("reward_attribution")
    flat = mask / mask.sum(dim=1, keepdim=True).clamp_min(1)
    # dividing by the row's largest first keeps sums of 1e30s and of 1e-30s finite
    peak = raw.abs().amax(dim=1, keepdim=True) if mask.shape[1] else raw.new_zeros(len(raw), 1)
    some = peak > 1e-12
    unit = torch.where(some, raw / torch.where(some, peak, 1.0), 0.0)
    unit = unit / unit.abs().sum(dim=1, keepdim=True).clamp_min(1e-12)
    return torch.where(mask, unit - flat * unit.sum(dim=1, keepdim=True), 0.0), flat
