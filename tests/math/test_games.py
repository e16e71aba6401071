"""Shapley values against brute force over all orders, on games whose values are known, and within their own errors."""

from __future__ import annotations

from itertools import permutations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from apportion.evidence.shapley_values import exact, max_players, sampled, shapley_values


class Game:
    """A value function that counts how many coalitions it was called with; `worth` has one number a coalition."""

    def __init__(self, players: int, seed: int) -> None:
        self.players, self.calls = players, 0
        self.worth = torch.randn(2**players, generator=torch.Generator().manual_seed(seed))

    def __call__(self, coalitions: Tensor) -> Tensor:
        self.calls += len(coalitions)
        return self.worth[(coalitions.long() * 2 ** torch.arange(self.players)).sum(dim=1)]


def brute_force(game: Game) -> Tensor:
    """Return each player's mean gain over all n! orders."""
    total = torch.zeros(game.players, dtype=torch.float64)
    orders = list(permutations(range(game.players)))
    for order in orders:
        inside = torch.zeros(1, game.players, dtype=torch.bool)
        for player in order:
            before = game(inside).double()
            inside[0, player] = True
            total[player] += (game(inside).double() - before)[0]
    return (total / len(orders)).float()


@given(players=st.integers(1, 5), seed=st.integers(0, 1000))
def test_exact_values_are_the_mean_gains_over_all_orders(players: int, seed: int) -> None:
    game = Game(players, seed)
    found = exact(game, players)
    assert found.calls == game.calls == 2**players and (found.errors == 0).all()
    torch.testing.assert_close(found.values, brute_force(game), rtol=0, atol=1e-6)
    assert found.empty == game.worth[0]
    assert found.values.sum().item() == pytest.approx(float(game.worth[-1] - game.worth[0]), abs=1e-5)


def both(value, players: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [exact(value, players).values, sampled(value, players, 5, generator).values]


def test_in_an_additive_game_each_gets_its_own_worth() -> None:
    worth = torch.tensor([1.0, -2, 0.5, 0, 3])
    for found in both(lambda c: 7 + c.float() @ worth, 5):
        torch.testing.assert_close(found, worth)
    assert (sampled(lambda c: c.float() @ worth, 5, 3).errors < 1e-6).all(), "every order gives the same"


def test_symmetric_players_get_the_same_and_a_dummy_nothing() -> None:
    """Worth 1 with at least two of players 0 to 2: a third each; player 3 changes nothing."""
    found = exact(lambda c: (c[:, :3].sum(dim=1) >= 2).float(), 4).values
    torch.testing.assert_close(found, torch.tensor([1 / 3, 1 / 3, 1 / 3, 0]))
    for values in both(lambda c: (c[:, :3].sum(dim=1) >= 2).float(), 4):
        assert values[3] == 0


def test_the_glove_game() -> None:
    """One left glove (player 0), two right ones; a pair is worth 1: 2/3, 1/6, 1/6."""
    found = exact(lambda c: (c[:, 0] & (c[:, 1] | c[:, 2])).float(), 3).values
    torch.testing.assert_close(found, torch.tensor([2 / 3, 1 / 6, 1 / 6]))


@pytest.mark.parametrize("seed", range(5))
def test_sampled_values_lie_within_their_own_errors(seed: int) -> None:
    game = Game(7, seed)
    true = exact(game, 7).values
    found = sampled(game, 7, 400, torch.Generator().manual_seed(seed))
    assert ((found.values - true).abs() <= 4 * found.errors).all()
    assert (found.errors > 0).all() and (found.errors < 0.2).all()
    few = sampled(game, 7, 25, torch.Generator().manual_seed(seed))
    ratio = float(few.errors.mean() / found.errors.mean())
    assert 2.5 < ratio < 6, "sixteen times the pairs should give a quarter of the error"
    assert found.values.sum().item() == pytest.approx(float(true.sum()), abs=1e-5), "each order adds up exactly"


def test_an_order_with_its_reverse_is_worth_more_than_two_orders() -> None:
    """In a game of pairs a reverse cancels what its order got wrong: exact from a single pair and any order."""
    weight = torch.randn(6, 6, generator=torch.Generator().manual_seed(0))

    def value(c: Tensor) -> Tensor:
        return torch.einsum("mi,ij,mj->m", c.float(), weight, c.float())

    found = sampled(value, 6, 2, torch.Generator().manual_seed(5))
    torch.testing.assert_close(found.values, exact(value, 6).values, rtol=0, atol=1e-5)


@pytest.mark.parametrize("budget", [6, 8, 13, 14, 64, 100])
def test_the_budget_is_kept(budget: int) -> None:
    for players in range(1, max_players(budget) + 1):
        game = Game(players, 0) if players <= 12 else None
        calls: list[int] = []

        def value(c: Tensor, game: Game | None = game, calls: list[int] = calls) -> Tensor:
            calls.append(len(c))
            return c.float().sum(dim=1) if game is None else game(c)

        found = shapley_values(value, players, budget, torch.Generator().manual_seed(0))
        assert found.calls == sum(calls) <= budget
        assert (found.errors == 0).all() == (2**players <= budget) or game is None
    with pytest.raises(ValueError, match=f"got {budget}; expected one for {players + 1} players"):
        shapley_values(lambda c: c.sum(dim=1), players + 1, budget)
