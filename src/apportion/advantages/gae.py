"""Generalised advantage estimation over actions: tokens, or any segments of them."""

from __future__ import annotations

import torch
from torch import Tensor

from apportion.errors import ConfigError, check_fraction, unknown_name
from apportion.masking import segment_count, segment_sum, spread
from apportion.types import Advantages, Estimator, Rollouts

POOLINGS = ("first", "mean", "last", "decayed")
REPRODUCE = "ma-rlhf-code"


def gae(gamma: float = 1.0, lam: float = 0.95, pooling: str = "first", *, reproduce: str | None = None) -> Estimator:
    """Return GAE(γ, λ) over actions k = 0..S−1 of each row:

        δ_k = R_k + γ·V_{k+1} − V_k,   A_k = δ_k + γλ·A_{k+1},   returns_k = A_k + V_k

    with R_k the **sum** of the action's token rewards, V_k its tokens' values pooled, and 0 (or, where a response was
    cut off, evidence "bootstrap_values") after the last action. λ=0 is the one-step error, λ=1 the Monte-Carlo return
    minus V, one action a row the bandit. γ and λ count per action; each token gets its action's advantage.

    Args:
        gamma: γ in [0, 1].
        lam: λ in [0, 1].
        pooling: V of an action of several tokens: "first" (the state in which it is chosen), "mean", "last", or
            "decayed" (weights ∝ 1/(n−i) at position i of n). Equal for one-token actions.
        reproduce: "ma-rlhf-code" pools rewards with the values' weights, as the released code does, so that R_k is
            the **mean** of the action's token rewards: a penalty on every token shrinks to 1/n of itself, and a score
            survives only where its token is an action of its own, which `ngrams(reproduce="ma-rlhf-code")` makes it.
            Only with pooling="mean"; the code's other two poolings do not work.

    Needs evidence "values" (B,T): V before token t. "bootstrap_values" (B,), V after the last token, is used on rows
    whose `ended` is False.

    Raises:
        ConfigError: γ, λ or pooling outside their range, or `reproduce` without pooling="mean". DataError: "values"
            absent.

    Sources: Schulman et al. 2016 (arXiv 1506.02438) eq. 16; Chai et al. 2024 (arXiv 2410.02743) for actions.

    Assumes: the critic learns the value of a state.
    Use it when there is a critic; λ trades its bias for the return's noise. With dense credit a smaller λ does less
    harm.
    """
    check_fraction("gae.gamma", gamma, "1 is usual for text.")
    check_fraction("gae.lam", lam, "0.95 is usual.")
    if pooling not in POOLINGS:
        raise unknown_name("gae.pooling", str(pooling), POOLINGS)
    if reproduce not in (None, REPRODUCE):
        raise unknown_name("gae.reproduce", str(reproduce), (REPRODUCE,))
    if reproduce and pooling != "mean":
        fix = "Set pooling: mean, the weights that the released code uses for values and rewards alike."
        raise ConfigError("gae.reproduce", f"{reproduce} with pooling {pooling}", "pooling mean", fix)
    return _Gae(float(gamma), float(lam), pooling, mean_rewards=reproduce == REPRODUCE)


class _Gae:
    needs = frozenset({"values"})

    def __init__(self, gamma: float, lam: float, pooling: str, *, mean_rewards: bool = False) -> None:
        self.gamma, self.lam, self.pooling, self.mean_rewards = gamma, lam, pooling, mean_rewards

    def __call__(self, rewards: Tensor, segments: Tensor, rollouts: Rollouts) -> Advantages:
        weights = pool_weights(segments, self.pooling)
        token_values = rollouts.require("values", "Give the run a value model.").float()
        values = segment_sum(token_values * weights, segments)
        returns = segment_sum(rewards.float() * weights if self.mean_rewards else rewards.float(), segments)
        count = segments.amax(dim=1) + 1 if segments.shape[1] else segments.new_zeros(len(segments))  # actions a row
        after = _values_after(rollouts, count)
        advantages = _gae_recursion(returns, values, count, after, self.gamma, self.lam)
        return Advantages(spread(advantages, segments), spread(advantages + values, segments))


def _values_after(rollouts: Rollouts, count: Tensor) -> Tensor:
    """Return (B,) the value after each row's last action: 0, or the bootstrap value of a row that was cut off."""
    bootstrap = rollouts.evidence.get("bootstrap_values")
    if bootstrap is None or rollouts.ended is None:
        return torch.zeros(len(rollouts), device=count.device)
    return torch.where(rollouts.ended, 0.0, bootstrap.float())


def _gae_recursion(rewards: Tensor, values: Tensor, count: Tensor, after: Tensor, gamma: float, lam: float) -> Tensor:
    """Return advantages (B,S) by the recursion from each row's last action; 0 beyond it."""
    out = torch.zeros_like(values)
    following, running = after, torch.zeros_like(after)
    for k in reversed(range(values.shape[1])):
        real = k < count
        delta = rewards[:, k] + gamma * following - values[:, k]
        running = torch.where(real, delta + gamma * lam * running, 0.0)
        following = torch.where(real, values[:, k], following)
        out[:, k] = running
    return out


def pool_weights(segments: Tensor, pooling: str) -> Tensor:
    """Return (B,T) float32 weights that sum to 1 over each action and pool its tokens' values; 0 off the mask."""
    on = segments >= 0
    size = spread(segment_sum(on.float(), segments), segments).clamp_min(1)
    if pooling == "mean":
        return on / size
    # position inside the action: tokens of a row up to here, minus those before its action began
    order = on.cumsum(dim=1) - 1
    starts = torch.full((len(segments), segment_count(segments)), segments.shape[1], device=segments.device)
    starts = starts.scatter_reduce(1, segments.clamp_min(0), torch.where(on, order, segments.shape[1]), "amin")
    position = order - spread(starts, segments)
    if pooling == "first":
        return (on & (position == 0)).float()
    if pooling == "last":
        return (on & (position == size - 1)).float()
    raw = torch.where(on, 1.0 / (size - position).clamp_min(1), 0.0)
    return raw / spread(segment_sum(raw, segments), segments).clamp_min(1e-12)
