"""Shapley: each span of the response earns what it adds to the score, averaged over all orders of joining."""

from __future__ import annotations

import torch
from torch import Tensor

from apportion import registry
from apportion.credit._evidence import is_first, is_last, row_evidence, token_evidence
from apportion.errors import ConfigError, check_fraction
from apportion.types import Credit, Rollouts, State

PARTS = ("values", "empty", "error", "calls", "joined")
SPANS = ("sentences", "segments")


def shapley(*, mix: float = 1.0, spans: str | int = "sentences", budget: int = 64, seed: int = 0) -> Credit:
    """Return (1−β)·r_t + β·(φ_t + v(∅)·1[t = first] + (S − v(∅) − Σφ)·1[t = last]), β = `mix`, S the row's rewards.

    φ_t is the Shapley value of t's span, evenly over its tokens, in the game whose value v(C) is the reward model's
    score of the prompt followed by the spans in C alone: the others are cut out of what the model reads, and positions
    count what is left. By efficiency Σφ = v(all) − v(∅), so with the score on the last token the last term is what
    centring, clipping and penalties added to it, and every row keeps its sum. v(∅), the prompt's own score, is the
    same for all its responses.

    Args:
        mix: β in [0, 1]; 0 is sparse bit for bit.
        spans: "sentences" (a span ends after . ! ? or a line break), "segments" (the run's actions), or a number of
            tokens a span. Tokens that the policy did not sample are always read.
        budget: most texts that the reward model reads for one rollout, >= 6. Exact where 2^spans fit; else random
            orders, each with its reverse, as many as fit. Neighbouring spans are joined until two such pairs fit.
        seed: of the orders; each row's depend on it and on its own tokens alone.

    Needs evidence "shapley_values" (B,T) and, of shape (B,), "shapley_empty" (v(∅)), "shapley_error" (the largest
    standard error of a span), "shapley_calls" (texts read) and "shapley_joined" (spans lost by joining), all made with
    these settings. It looks at the whole response: not causal, its policy gradient is biased.

    Raises:
        ConfigError: a setting outside its range. DataError: evidence absent, of the wrong shape or not finite.

    Sources: Shapley 1953; SCAR 2025 (arXiv 2505.20417); antithetic orders: Mitchell et al. 2022 (arXiv 2104.12199).

    Assumes: a text with spans cut out still means something to the reward model.
    Use it when few spans matter, reward-model calls are cheap, and a fair division is wanted.
    """
    check_fraction("shapley.mix", mix)
    if spans not in SPANS and not (isinstance(spans, int) and not isinstance(spans, bool) and spans >= 1):
        expected = f"{', '.join(SPANS)} or a number of tokens >= 1"
        raise ConfigError("shapley.spans", spans, expected, "Use 5 for spans of five tokens.")
    for field, value, least in (("budget", budget, 6), ("seed", seed, 0)):
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ConfigError(f"shapley.{field}", value, f"a whole number >= {least}", "64 is usual.")
    settings = {"spans": spans, "budget": budget, "seed": seed}
    names = {part: registry.ask(f"shapley_{part}", **settings) for part in PARTS}

    def assign(rollouts: Rollouts, rewards: Tensor, state: State) -> tuple[Tensor, State]:
        mask = rollouts.mask
        values, empty = token_evidence(rollouts, names["values"]), row_evidence(rollouts, names["empty"])
        if mix == 0.0:  # bit for bit the rewards that came
            return torch.where(mask, rewards, 0), state
        r = torch.where(mask, rewards.float(), 0.0)
        rest = r.sum(dim=1) - empty - values.sum(dim=1)
        ends = torch.where(is_first(mask), empty[:, None], 0.0) + torch.where(is_last(mask), rest[:, None], 0.0)
        return ((1.0 - mix) * r + mix * (values + ends)).to(rewards.dtype), state

    def stats(rollouts: Rollouts, before: Tensor, after: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        rows = rollouts.mask.any(dim=1).sum().float()
        told = ("error", "calls", "joined")
        return {f"credit/shapley_{part}": (row_evidence(rollouts, names[part]).sum(), rows) for part in told}

    needs = frozenset(names.values())
    return Credit(dict, assign, needs, keeps_return=True, causal=False, stats=stats, redistributes=True)
