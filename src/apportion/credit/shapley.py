"""Shapley: each span of the response earns its marginal effect on the score, averaged over all orders."""

from __future__ import annotations

import torch
from torch import Tensor

from apportion.errors import ConfigError, check_fraction, check_whole
from apportion.masking import is_first, is_last
from apportion.registry import EvidenceKey
from apportion.types import Credit, Rollouts, State

PARTS = ("values", "empty", "error", "calls", "joined")
SPANS = ("sentences", "segments")


def shapley(*, mix: float = 1.0, spans: str | int = "sentences", budget: int = 64, seed: int = 0) -> Credit:
    """Return (1−β)·r_t + β·(φ_t + v(∅)·1[t = first] + (S − v(∅) − Σφ)·1[t = last]), β = `mix`, S the row's rewards.

    φ_t is the Shapley value of t's span, evenly over its tokens, in the game whose value v(C) is the reward model's
    score of the prompt followed by only the spans in C: the other spans are removed from its input, and positions are
    renumbered. By efficiency Σφ = v(all) − v(∅), so with the score on the last token the last term is the change by
    centring, clipping and penalties, and every row keeps its sum. v(∅), the prompt's own score, is the same for all its
    responses.

    Args:
        mix: β in [0, 1]; 0 equals sparse bitwise.
        spans: "sentences" (a span ends after . ! ? or a line break), "segments" (the run's actions), or a number of
            tokens a span. Tokens that the policy did not sample are in every coalition.
        budget: most texts that the reward model scores for one rollout, >= 6. Exact where 2^spans fit; else random
            orders, each with its reverse, as many as fit. Neighbouring spans are joined until two such pairs fit.
        seed: of the random orders, which depend only on it and on the row's own tokens.

    Needs evidence "shapley_values" (B,T) and, of shape (B,), "shapley_empty" (v(∅)), "shapley_error" (the largest
    standard error of a span), "shapley_calls" (texts scored) and "shapley_joined" (spans lost by joining), all produced
    with these settings. It depends on the whole response: not causal, its policy gradient is biased.

    Raises:
        ConfigError: a setting outside its range. DataError: evidence absent, of the wrong shape or not finite.

    Sources: Shapley 1953; SCAR 2025 (arXiv 2505.20417); antithetic orders: Mitchell et al. 2022 (arXiv 2104.12199).

    Assumes: the reward model's score of a text with spans removed is meaningful.
    Use it when few spans matter, reward-model calls are cheap, and a fair division is wanted.
    """
    check_fraction("shapley.mix", mix)
    if spans not in SPANS and not (isinstance(spans, int) and not isinstance(spans, bool) and spans >= 1):
        expected = f"{', '.join(SPANS)} or a number of tokens >= 1"
        raise ConfigError("shapley.spans", spans, expected, "Use 5 for spans of five tokens.")
    for field, value, least in (("budget", budget, 6), ("seed", seed, 0)):
        check_whole(f"shapley.{field}", value, least, "64 is usual.")
    settings = {"spans": spans, "budget": budget, "seed": seed}
    names = {part: EvidenceKey(f"shapley_{part}", **settings) for part in PARTS}

    def assign(rollouts: Rollouts, rewards: Tensor, state: State) -> tuple[Tensor, State]:
        mask = rollouts.mask
        values, empty = rollouts.token_evidence(names["values"]), rollouts.row_evidence(names["empty"])
        if mix == 0.0:  # bitwise the input rewards
            return torch.where(mask, rewards, 0), state
        r = torch.where(mask, rewards.float(), 0.0)
        rest = r.sum(dim=1) - empty - values.sum(dim=1)
        ends = torch.where(is_first(mask), empty[:, None], 0.0) + torch.where(is_last(mask), rest[:, None], 0.0)
        return ((1.0 - mix) * r + mix * (values + ends)).to(rewards.dtype), state

    def stats(rollouts: Rollouts, before: Tensor, after: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        rows = rollouts.mask.any(dim=1).sum().float()
        parts = ("error", "calls", "joined")
        return {f"credit/shapley_{part}": (rollouts.row_evidence(names[part]).sum(), rows) for part in parts}

    needs = frozenset(names.values())
    return Credit(dict, assign, needs, keeps_return=True, causal=False, stats=stats, redistributes=True)
