"""Shapley values of a game given by its value function: exact, or from random orders."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

Value = Callable[[Tensor], Tensor]  # coalitions (M,n) bool -> the value of each (M,) float
LEAST_PAIRS = 2  # a standard error needs two


class Shapley(NamedTuple):
    """The values (n,) of n players, their standard errors (n,) (0 when exact), v(∅), and the number of calls of v."""

    values: Tensor
    errors: Tensor
    empty: Tensor
    calls: int


def max_players(budget: int) -> int:
    """Return the largest number of players that `budget` calls of v can serve, exactly or with two pairs of orders."""
    # both pairs evaluate v(∅) and v(all) once, and n − 1 more coalitions an order
    return max(budget.bit_length() - 1, (budget - 2) // (2 * LEAST_PAIRS) + 1)


def shapley_values(value: Value, players: int, budget: int, generator: torch.Generator | None = None) -> Shapley:
    """Return Shapley values with at most `budget` calls: exact where 2^n coalitions fit, else from random orders.

    Raises:
        ValueError: the budget is too small for `players`; see `max_players`.
    """
    if 2**players <= budget:
        return exact(value, players)
    pairs = (budget - 2) // (2 * (players - 1))
    if pairs < LEAST_PAIRS:
        raise ValueError(f"budget: got {budget}; expected one for {players} players. Join some of them.")
    return sampled(value, players, pairs, generator)


def exact(value: Value, players: int) -> Shapley:
    """Return φ_i = Σ_C |C|!(n−|C|−1)!/n! · (v(C∪i) − v(C)) over all 2^n coalitions C without i.

    Source: Shapley 1953, "A value for n-person games".
    """
    numbers = torch.arange(2**players)
    coalitions = (numbers[:, None] >> torch.arange(players)) % 2 == 1
    worth = value(coalitions).double()
    size = coalitions.sum(dim=1)
    weight = torch.tensor([1.0 / (players * math.comb(players - 1, k)) for k in range(players)], dtype=torch.float64)
    values = torch.zeros(players, dtype=torch.float64)
    for i in range(players):
        without = numbers[~coalitions[:, i]]
        values[i] = (weight[size[without]] * (worth[without + 2**i] - worth[without]).cpu()).sum()
    return Shapley(values.float(), torch.zeros(players), worth[0].float(), 2**players)


def sampled(value: Value, players: int, pairs: int, generator: torch.Generator | None = None) -> Shapley:
    """Return the mean gains over `pairs` random orders and their reverses; each order's gains add up to v(all) − v(∅).

    An order and its reverse are an antithetic pair, so the standard error is that of the pairs' means. A coalition that
    several orders share is evaluated once.
    """
    draws = [torch.randperm(players, generator=generator) for _ in range(pairs)]
    orders = torch.stack([order for draw in draws for order in (draw, draw.flip(0))])  # (2p,n)
    # player i is in the coalition of the first k of an order when its rank there is below k
    rank = orders.argsort(dim=1)
    coalitions = rank[:, None, :] < torch.arange(players + 1)[None, :, None]  # (2p,n+1,n)
    unique, back = coalitions.reshape(-1, players).unique(dim=0, return_inverse=True)
    worth = value(unique).double().cpu()[back].reshape(2 * pairs, players + 1)
    gains = (worth[:, 1:] - worth[:, :-1]).gather(1, rank)  # by player
    means = gains.reshape(pairs, 2, players).mean(dim=1)
    errors = means.std(dim=0) / math.sqrt(pairs)
    return Shapley(means.mean(dim=0).float(), errors.float(), worth[0, 0].float(), len(unique))
