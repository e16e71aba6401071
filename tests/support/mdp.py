"""Small token problems in which every response can be enumerated: exact ∇J, and a method's exact expected gradient.

A problem has a vocabulary, a length, a tabular softmax policy (one row of logits a state, a state being the tokens so
far) and a score for *every* sequence, so that prefixes and coalitions have scores too. With `free_end` token 0 ends
the response; without it all responses have the full length.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import permutations, product
from typing import NamedTuple

import torch
from torch import Tensor

from apportion import Credit, Rollouts, advantages, credit, segments

EOS = 0
Tokens = tuple[int, ...]


@dataclass
class Problem:
    """A token MDP; `scores` maps every sequence of at most `length` tokens to its score."""

    vocabulary: int
    length: int
    free_end: bool
    scores: Mapping[Tokens, float]
    seed: int = 0
    states: dict[Tokens, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        every = [s for n in range(self.length) for s in product(range(self.vocabulary), repeat=n)]
        self.states = {s: i for i, s in enumerate(s for s in every if not (self.free_end and EOS in s))}
        shape = len(self.states), self.vocabulary
        self.logits = (0.7 * torch.randn(shape, generator=generator, dtype=torch.float64)).requires_grad_()
        self.values = torch.randn(len(self.states), generator=generator)  # a critic: any function of the state

    def responses(self) -> list[Tokens]:
        """Return every complete response."""
        whole = [s for n in range(1, self.length + 1) for s in product(range(self.vocabulary), repeat=n)]
        return [s for s in whole if (len(s) == self.length or self.ends(s)) and not self.ends(s[:-1])]

    def ends(self, tokens: Tokens) -> bool:
        """Whether a response is over after `tokens`, before the length limit."""
        return self.free_end and EOS in tokens


def random_scores(vocabulary: int, length: int, seed: int) -> dict[Tokens, float]:
    """Return a score for every sequence of at most `length` tokens, each drawn on its own around 0.5."""
    generator = torch.Generator().manual_seed(1000 + seed)
    every = [s for n in range(length + 1) for s in product(range(vocabulary), repeat=n)]
    return dict(zip(every, (torch.randn(len(every), generator=generator) + 0.5).tolist(), strict=True))


def shapley_values(scores: Mapping[Tokens, float], response: Tokens) -> list[float]:
    """Return each token's mean gain over all orders in which the tokens could join, the others left out."""
    size, orders = len(response), list(permutations(range(len(response))))
    total = [0.0] * size
    for order in orders:
        joined: list[int] = []
        for token in order:
            before = scores[tuple(response[i] for i in sorted(joined))]
            joined.append(token)
            total[token] += scores[tuple(response[i] for i in sorted(joined))] - before
    return [t / len(orders) for t in total]


class World(NamedTuple):
    """A problem written out: rollouts of every response, and what each was worth to the policy.

    `logprobs` (N,T) carries the gradient to `problem.logits`, `probability` (N,) does as well.
    """

    problem: Problem
    rollouts: Rollouts
    logprobs: Tensor
    probability: Tensor


def enumerate_world(problem: Problem) -> World:
    """Return every response of `problem` as one batch, with evidence for any credit.

    "prefix_scores", "prompt_score" and "shapley_*" follow from the scores; "potential" is any function of the state;
    "reward_attention" and "policy_attention_mean" are positive and of the whole response; "reward_attribution" is
    what the score loses without the token, signed.
    """
    found, scores = problem.responses(), problem.scores
    size, length = len(found), problem.length
    mask = torch.tensor([[t < len(r) for t in range(length)] for r in found])
    ids = torch.tensor([[*r, *[0] * (length - len(r))] for r in found])
    at = torch.tensor([[problem.states.get(r[:t], 0) if t < len(r) else 0 for t in range(length)] for r in found])
    chosen = problem.logits.log_softmax(dim=1)[at].gather(2, ids[..., None]).squeeze(2)
    logprobs = torch.where(mask, chosen, 0.0)
    generator = torch.Generator().manual_seed(2000 + problem.seed)
    any_state = {r[:t]: float(torch.randn((), generator=generator)) for r in found for t in range(1, length + 1)}

    def table(entry: object) -> Tensor:
        rows = [[entry(r, t) if t < len(r) else torch.nan for t in range(length)] for r in found]  # type: ignore[operator]
        return torch.tensor(rows)

    shapley = {r: shapley_values(scores, r) for r in found}
    evidence = {
        "values": torch.where(mask, problem.values[at], torch.nan),
        "prefix_scores": table(lambda r, t: scores[r[: t + 1]]),
        "potential": table(lambda r, t: any_state[r[: t + 1]]),
        "prompt_score": torch.full((size,), scores[()]),
        "reward_attention": torch.rand(mask.shape, generator=generator).square(),
        "policy_attention_mean": torch.rand(mask.shape, generator=generator).square(),
        "reward_attribution": table(lambda r, t: scores[r] - scores[r[:t] + r[t + 1 :]]),
        "shapley_values": table(lambda r, t: shapley[r][t]),
        "shapley_empty": torch.full((size,), scores[()]),
    }
    none = torch.zeros(size)
    for name in credit.shapley().needs:  # asked for with its settings
        evidence[name] = evidence.get(name.partition("@")[0], none)
    rollouts = Rollouts(
        prompt_ids=torch.full((size, 1), problem.vocabulary),
        prompt_mask=torch.ones(size, 1, dtype=torch.bool),
        response_ids=ids,
        mask=mask,
        logprobs=logprobs.detach().float(),
        scores=torch.tensor([scores[r] for r in found]),
        group=torch.zeros(size, dtype=torch.int64),
        evidence=evidence,
    )
    return World(problem, rollouts, logprobs, logprobs.sum(dim=1).exp())


def true_gradient(world: World) -> Tensor:
    """Return ∇J of J = Σ p(τ)·R(τ), as (states, vocabulary) float64."""
    assert world.rollouts.scores is not None
    objective = (world.probability * world.rollouts.scores.double()).sum()
    return torch.autograd.grad(objective, world.problem.logits, retain_graph=True)[0]


def expected_gradient(world: World, method: Credit) -> Tensor:
    """Return Σ_τ p(τ)·Σ_t A_t·∇log π(a_t|s_t) with `method`'s rewards, λ = γ = 1 and a critic that is any V(s)."""
    rewards, _ = credit.apply(method, world.rollouts)
    ids = segments.tokens()(world.rollouts)
    found = advantages.gae(lam=1.0)(rewards, ids, world.rollouts).advantages
    return weighted_scores(world, found)


def weighted_scores(world: World, weights: Tensor) -> Tensor:
    """Return Σ_τ p(τ)·Σ_t w_t·∇log π(a_t|s_t) for weights (N,T)."""
    surrogate = (world.probability.detach()[:, None] * weights.double() * world.logprobs).sum()
    return torch.autograd.grad(surrogate, world.problem.logits, retain_graph=True)[0]


def paid_before(rewards: Tensor) -> Tensor:
    """Return (N,T) what each row was paid before token t: what a reward-to-go leaves out."""
    return rewards.cumsum(dim=1) - rewards
