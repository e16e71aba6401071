"""Statistics of sampled policy gradients compared with the true gradient: cosine, bias, signal-to-noise ratio.

Units are independent samples (the prompts); rows of a unit share a baseline and are averaged. Inner products of
expectations leave out pairs of a unit with itself, so noise does not bias them. Intervals are bootstrapped over units.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

Interval = dict[str, float | None]
RESAMPLES = 1000
RESOLVED = 0.95  # share of the resamples in which a figure must be finite


def reward_to_go(rewards: Tensor, mask: Tensor) -> Tensor:
    """Return Σ_{i≥t} r_i (B,T) float32 over the mask, 0 off it."""
    on = torch.where(mask, rewards.float(), 0.0)
    return torch.where(mask, on.flip(1).cumsum(dim=1).flip(1), 0.0)


def leave_one_out_baseline(returns: Tensor, mask: Tensor, group: Tensor) -> Tensor:
    """Return `returns` (B,T) minus, at each position, the mean of the group's other rows that have that position.

    The baseline depends only on the position and on other rollouts, so the expected gradient is unchanged. A row keeps
    its return where it is the only one at its position.
    """
    _, index = group.unique(return_inverse=True)
    on = torch.where(mask, returns.float(), 0.0)
    groups = int(index.max()) + 1 if len(index) else 0
    total = on.new_zeros(groups, on.shape[1]).index_add_(0, index, on)[index] - on
    others = on.new_zeros(groups, on.shape[1]).index_add_(0, index, mask.float())[index] - mask.float()
    return torch.where(mask, on - total / others.clamp_min(1), 0.0)


def centred_scores(scores: Tensor, group: Tensor) -> Tensor:
    """Return scores (B,) minus the mean of the group's other rows: the weight of a whole response in ∇J."""
    return leave_one_out_baseline(scores[:, None], torch.ones_like(scores[:, None], dtype=torch.bool), group)[:, 0]


class Gradients:
    """Sampled gradients of several methods over U units: what a comparison of their expectations needs.

    Args:
        units: {name: (U,K)} mean gradient of each unit, "true" among the names.
        squares: {name: (U,)} mean squared norm of a single row's gradient in each unit.
    """

    def __init__(self, units: Mapping[str, Tensor], squares: Mapping[str, Tensor]) -> None:
        self.names = list(units)
        self.count = len(next(iter(units.values())))
        stacked = torch.cat([units[name].float() for name in self.names])
        # float64: the figures are differences of nearly equal products
        products = (stacked @ stacked.T).double().reshape(len(self.names), self.count, len(self.names), self.count)
        self._gram = products.permute(0, 2, 1, 3)  # (M,M,U,U)
        self._squares = {name: squares[name].double() for name in self.names}

    def inner(self, one: str, two: str, weights: Tensor) -> Tensor:
        """Return estimates (R,) of ⟨E g_one, E g_two⟩ from unit weights (R,U), without pairs of a unit with itself."""
        gram = self._gram[self.names.index(one), self.names.index(two)]
        cross = ((weights @ gram) * weights).sum(dim=1) - (weights**2) @ gram.diagonal()
        return cross / (weights.sum(dim=1) ** 2 - (weights**2).sum(dim=1)).clamp_min(1e-12)

    def cosine(self, name: str, weights: Tensor) -> Tensor:
        """Return cos(E g, ∇J) (R,); NaN where the sampled norms are within the noise."""
        one, two = self.inner(name, name, weights), self.inner("true", "true", weights)
        positive = (one > 0) & (two > 0)  # the product of two negative estimates is positive
        cosine = self.inner(name, "true", weights) / torch.where(positive, one * two, torch.nan).sqrt()
        return cosine.clamp(-1.0, 1.0)  # a ratio of estimates may be outside [-1, 1]

    def bias(self, name: str, weights: Tensor) -> Tensor:
        """Return ‖E g − ∇J‖/‖∇J‖ (R,), 0 where the difference is within the noise."""
        true = self.inner("true", "true", weights)
        square = self.inner(name, name, weights) - 2 * self.inner(name, "true", weights) + true
        return (square.clamp_min(0) / torch.where(true > 0, true, torch.nan)).sqrt()

    def snr(self, name: str, weights: Tensor, batch: int) -> Tensor:
        """Return ‖E g‖ over the root mean squared error of a batch of `batch` rows' mean gradient, (R,)."""
        signal = self.inner(name, name, weights)
        square = (weights @ self._squares[name]) / weights.sum(dim=1)
        noise = (square - signal).clamp_min(1e-30) / batch
        return (signal.clamp_min(0) / noise).sqrt()

    def useful(self, name: str, weights: Tensor, batch: int) -> Tensor:
        """Return the signal-to-noise ratio along ∇J: ⟨E g, ∇J⟩/‖∇J‖ over the same noise, (R,)."""
        true = self.inner("true", "true", weights)
        along = self.inner(name, "true", weights) / torch.where(true > 0, true, torch.nan).sqrt()
        square = (weights @ self._squares[name]) / weights.sum(dim=1)
        return along / ((square - self.inner(name, name, weights)).clamp_min(1e-30) / batch).sqrt()

    def interval(self, statistic: Callable[[Tensor], Tensor], seed: int = 0) -> Interval:
        """Return {mean, low, high} of `statistic(weights (R,U))`: at all units, and 95% over bootstrapped units.

        None where it is not finite, or not finite in more than 5% of the resamples, whose omission would bias the
        interval.
        """
        value = statistic(torch.ones(1, self.count, dtype=torch.float64))[0]
        resampled = statistic(bootstrap(self.count, RESAMPLES, seed))
        finite = resampled[torch.isfinite(resampled)]
        if not torch.isfinite(value) or len(finite) < RESOLVED * RESAMPLES:
            return {"mean": None, "low": None, "high": None}
        low, high = torch.quantile(finite, torch.tensor([0.025, 0.975], dtype=finite.dtype)).tolist()
        return {"mean": float(value), "low": low, "high": high}


def bootstrap(count: int, resamples: int, seed: int) -> Tensor:
    """Return how often each of `count` units is sampled, (R,U) float64."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(count, (resamples, count), generator=generator)
    return torch.zeros(resamples, count, dtype=torch.float64).scatter_add_(
        1, drawn, torch.ones(resamples, count, dtype=torch.float64)
    )


def mean_over_units(values: Tensor, seed: int = 0) -> Interval:
    """Return {mean, low, high} of the mean of `values` (U,), bootstrapped over units; None for no units."""
    if not len(values):
        return {"mean": None, "low": None, "high": None}
    weights = bootstrap(len(values), RESAMPLES, seed)
    drawn = (weights @ values.double()) / weights.sum(dim=1)
    low, high = torch.quantile(drawn, torch.tensor([0.025, 0.975], dtype=drawn.dtype)).tolist()
    return {"mean": float(values.double().mean()), "low": low, "high": high}


def correlation(one: Tensor, two: Tensor) -> float | None:
    """Return Pearson's r of two (N,) tensors; None when one of them is constant."""
    one, two = one.double() - one.double().mean(), two.double() - two.double().mean()
    scale = one.norm() * two.norm()
    return float((one @ two) / scale) if scale > 1e-12 else None


def row_squares(advantages: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Return ‖Σ_t A_t·v_t h_tᵀ‖² (B,) from A (B,T), v (B,T,d), h (B,T,e), without any d×e matrix."""
    weighted = advantages[..., None] * left
    return ((weighted @ weighted.transpose(1, 2)) * (right @ right.transpose(1, 2))).sum(dim=(1, 2))


VERDICTS = (
    "agrees with the true gradient",
    "mostly agrees with the true gradient",
    "has another direction",
    "is not resolved",
)


def direction(cosine: Interval) -> str:
    """Return an interval of a cosine in words: "another direction" excludes every cosine of 0.95 or more."""
    low, high = cosine["low"], cosine["high"]
    if low is None or high is None or high - low > 0.5:
        return VERDICTS[3]
    if low >= 0.7:
        return VERDICTS[0] if low >= 0.95 else VERDICTS[1]
    return VERDICTS[2] if high < 0.95 else VERDICTS[3]
