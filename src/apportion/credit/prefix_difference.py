"""Prefix difference: each token earns its change of the score of the text so far (a state potential)."""

from __future__ import annotations

import torch
from torch import Tensor

from apportion.errors import check_fraction, unknown_name
from apportion.masking import is_last, previous
from apportion.types import Credit, Rollouts, State

INITIAL = ("first", "omit")


def prefix_difference(*, mix: float = 1.0, initial: str = "first") -> Credit:
    """Return r_t + β·(Φ_t − Φ_{t−1}) with β = `mix`, Φ_t the score of prompt and response up to token t.

    Φ is 0 after the last token: nothing more can be earned there. With the score R on the last token this is

        r_t = β·(R(x,y≤t) − R(x,y<t)) + (1−β)·R·1[t = last]

    and any other rewards (an earlier penalty, a clipped or replaced score) stay in place, so that each row keeps its
    sum exactly and the difference between the score and R(x,y) lands on the last token. It is potential-based shaping:
    Φ depends only on the tokens so far, so the policy gradient stays unbiased, and at γ=1 GAE with a critic V−Φ equals
    GAE of the sparse reward with V. Scores of unfinished text are out of distribution for a reward model: check the
    calibration before trusting them. In a row with holes, the effect of a tool's output goes to the token after it.

    Args:
        mix: β in [0, 1]; 0 equals sparse bitwise.
        initial: where the prompt's own score R(x) goes. "first" puts it on the first token, so that the row's sum is
            kept; "omit" leaves it out (the sum falls by β·R(x), the same for every response to a prompt).

    Needs evidence "prefix_scores" (B,T), the score *after* token t in the units of the rewards; with "omit" also
    "prompt_score" (B,). Causal: that a response ends at token t is known at t.

    Raises:
        ConfigError: `mix` outside [0, 1], or an unknown `initial`.
        DataError: evidence absent, of the wrong shape or not finite.

    Sources: R3HF/RED 2024 (arXiv 2411.08302); Ng et al. 1999 for shaping.

    Assumes: the reward model's score of an unfinished text is meaningful; see `by_length` of its evaluation.
    Use it when unbiased dense rewards are wanted and the reward model scores prefixes well.
    """
    check_fraction("prefix_difference.mix", mix)
    if initial not in INITIAL:
        raise unknown_name("prefix_difference.initial", str(initial), INITIAL)

    def assign(rollouts: Rollouts, rewards: Tensor, state: State) -> tuple[Tensor, State]:
        mask = rollouts.mask
        scores = rollouts.token_evidence("prefix_scores")
        start = rollouts.row_evidence("prompt_score")[:, None] if initial == "omit" else 0.0
        if mix == 0.0:  # bitwise the input rewards
            return torch.where(mask, rewards, 0), state
        after = torch.where(is_last(mask), 0.0, scores)
        shaped = torch.where(mask, rewards.float(), 0.0) + mix * (after - previous(scores, mask, start))
        return torch.where(mask, shaped, 0.0).to(rewards.dtype), state

    def stats(rollouts: Rollouts, before: Tensor, after: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        mask, scores = rollouts.mask, rollouts.token_evidence("prefix_scores")
        moves = torch.where(mask, scores - previous(scores, mask, scores), 0.0).abs()  # none before the first token
        # distance of the full text's score from the row's rewards: centring, clipping, penalties
        gap = (torch.where(is_last(mask), scores, 0.0) - torch.where(mask, before.float(), 0.0)).sum(dim=1).abs()
        return {
            "credit/prefix_move": (moves.sum(), mask.sum().float()),
            "credit/prefix_gap": (gap.sum(), mask.any(dim=1).sum().float()),
        }

    needs = frozenset({"prefix_scores"} | ({"prompt_score"} if initial == "omit" else set()))
    keeps_return = initial == "first"
    return Credit(dict, assign, needs, keeps_return=keeps_return, causal=True, stats=stats, redistributes=True)
