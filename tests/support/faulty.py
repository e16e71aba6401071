"""User-supplied modules in which each function has one fault: process rewards and methods."""

from __future__ import annotations

REWARDS = '''
"""Process rewards that fail in one way each, at one batch (one call a batch)."""
import collections, itertools, time

CALLS = itertools.count(1)


def plain(texts, rollouts, prompts):
    return [[0.1 * (i % 3) for i in range(n)] for n in rollouts.mask.sum(dim=1).tolist()]


def nan_at_seven(texts, rollouts, prompts):
    rows = plain(texts, rollouts, prompts)
    if next(CALLS) == 7:
        rows[2][1] = float("nan")
    return rows


def raises(texts, rollouts, prompts):
    if next(CALLS) == 2:
        raise ConnectionError("the reward service\\nis down")
    return plain(texts, rollouts, prompts)


def leaves(texts, rollouts, prompts):
    raise SystemExit(0)


def retries(texts, rollouts, prompts):
    while next(CALLS) > 1:
        try:
            time.sleep(30)
        except Exception:
            pass
    return plain(texts, rollouts, prompts)


def hangs_in_c(texts, rollouts, prompts):
    if next(CALLS) == 2:
        collections.deque(itertools.repeat(0), maxlen=0)  # holds Python's lock, looks at no signal
    return plain(texts, rollouts, prompts)


def poisons(models, rollouts, texts):
    if next(CALLS) == 6:  # the reward model answers nan from the next batch on
        models.reward.model.get_input_embeddings().weight.data.fill_(float("nan"))
    return rollouts.mask.sum(dim=1).float()


def infinite(models, rollouts, texts):
    return rollouts.mask.sum(dim=1).float() / 0.0
'''
METHODS = '''
"""A loss whose gradient is infinite in some updates; credits, a segmenter and an estimator with mistakes in them."""
import itertools, os, sys, time
import torch
from apportion import Advantages, Credit, PolicyLoss
from apportion.losses import ppo


class Infinite(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * torch.inf


def infinite(*, updates: list = (), loss: bool = False):
    plain, calls = ppo(), itertools.count(1)

    def terms(*given):
        total, sums = plain.terms(*given)
        return (total * torch.inf if loss else Infinite.apply(total)) if next(calls) in updates else total, sums

    return plain._replace(terms=terms)


def mistaken(*, how: str = "raise"):
    def assign(rollouts, rewards, state):
        if how == "raise":
            return rewards[:, 10**9], state
        return (rewards / 0.0 if how == "nan" else rewards), state

    return Credit(dict, assign, frozenset(), keeps_return=False, causal=True)


class Estimate:
    needs = frozenset()

    def __init__(self, how):
        self.how, self.calls = how, itertools.count(1)

    def __call__(self, rewards, segments, rollouts):
        nan = rewards.clone()
        nan[2, 1] = torch.nan
        made = {
            "raise": lambda: {}["no such table"],
            "tuple": lambda: (rewards, rewards),
            "narrow": lambda: Advantages(rewards[:, :-1], rewards),
            "flat": lambda: Advantages(rewards, rewards.sum(dim=1)),
            "whole": lambda: Advantages(rewards.long(), rewards),
            "nan": lambda: Advantages(rewards, nan),
            "leave": lambda: sys.exit(0),
            "elsewhere": lambda: sys.exit(0) if os.environ.get("RANK") == "1" else Advantages(rewards, rewards),
        }
        return made.get(self.how, lambda: Advantages(rewards, rewards))()

    def stats(self, rewards, segments, rollouts):
        if self.how == "slow stats":
            time.sleep(30)
        if self.how == "infinite stats":
            return {"mine": (rewards.sum() * torch.inf, torch.ones(()))}
        return {"mine": rewards.sum()} if self.how == "bare stats" else {}


def estimate(*, how: str = "raise"):
    return Estimate(how)


class Slow:
    """A segmenter that hangs in its call number `at`."""

    needs = frozenset()

    def __init__(self, at):
        self.at, self.calls = at, itertools.count(1)

    def __call__(self, rollouts):
        if next(self.calls) == self.at:
            time.sleep(30)
        return torch.where(rollouts.mask, rollouts.mask.cumsum(dim=1) - 1, -1)


def slow(*, at: int = 1):
    return Slow(at)


class Uneven:
    """A segmenter whose ids begin with 1 in the rollout of prompt 2, or are a list."""

    needs = frozenset()

    def __init__(self, listed):
        self.listed = listed

    def __call__(self, rollouts):
        ids = torch.where(rollouts.mask, rollouts.mask.cumsum(dim=1) - 1, -1)
        return ids.tolist() if self.listed else ids + (rollouts.group == 2).long()[:, None]


def uneven(*, listed: bool = False):
    return Uneven(listed)


def slow_credit(*, at: int = 1, part: str = "assign"):
    calls = itertools.count(1)

    def wait(name):
        if name == part and next(calls) == at:
            time.sleep(30)

    def assign(rollouts, rewards, state):
        wait("assign")
        return rewards, state

    def share(rollouts):
        wait("share")
        return rollouts.mask / rollouts.mask.sum(dim=1, keepdim=True)

    def stats(rollouts, before, after):
        wait("stats")
        return {"mine": (before.sum(), torch.ones(()))}

    def update(state, sums):
        wait("update")
        return state

    return Credit(dict, assign, frozenset(), True, False, share, stats, update)


def broken_loss():
    def terms(*given):
        raise ZeroDivisionError("division by zero in my loss")

    return ppo()._replace(terms=terms)
'''
