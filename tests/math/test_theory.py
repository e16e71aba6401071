"""The effect of redistribution on the policy gradient, in expectation over every trajectory of a small problem.

Conservation of the return always holds; an unbiased gradient does not. Both counterexamples are expected properties:
they must keep failing to learn, or the documentation is wrong.
"""

from __future__ import annotations

from itertools import product

import helpers
import pytest
import torch
from torch import Tensor

from apportion import advantages, credit, segments


def gradients(method: credit.Credit, rollouts, logprobs: Tensor, parameter: Tensor) -> Tensor:
    """Return E[Σ_t ∇log π(a_t)·A_t] with V = 0 and λ = γ = 1 (reward to go), exact over the trajectories given."""
    rewards, _ = credit.apply(method, rollouts)
    adv = advantages.gae(lam=1.0)(rewards, segments.tokens()(rollouts), rollouts).advantages
    kept = torch.where(rollouts.mask, logprobs, 0)
    probability = kept.sum(dim=1).exp().detach()
    (grad,) = torch.autograd.grad((probability[:, None] * kept * adv).sum(), parameter, retain_graph=True)
    return grad


def two_tokens(score: int, share: list[float]):
    """Return (rollouts of all four pairs of actions, log-probs, logits (2,)); R = 1 when token `score` is 1."""
    logits = torch.tensor([0.3, -0.4], requires_grad=True)
    actions = torch.tensor(list(product((0, 1), repeat=2)))
    logprobs = torch.where(actions == 1, logits.sigmoid(), 1 - logits.sigmoid()).log()
    mask = torch.ones(4, 2, dtype=torch.bool)
    given = {"reward_attention": torch.tensor([share] * 4), "values": torch.zeros(4, 2)}
    return helpers.rollouts(mask, given, scores=actions[:, score].float(), **given), logprobs, logits


def test_attention_on_the_wrong_token_never_teaches_the_right_one():
    """T=2, α=(1,0), R set by token 2: its reward is already paid when it is chosen, so its gradient is exactly 0."""
    rollouts, logprobs, logits = two_tokens(1, [1.0, 0.0])
    p = logits.sigmoid()[1].item()
    true = torch.tensor([0.0, p * (1 - p)])  # dE[R]/d logits
    torch.testing.assert_close(gradients(credit.sparse(), rollouts, logprobs, logits), true)
    torch.testing.assert_close(gradients(credit.attention(mix=1.0), rollouts, logprobs, logits), torch.zeros(2))
    # β = .8 leaves a fifth of the signal, uniform a half (its token-2 reward is R/2)
    torch.testing.assert_close(gradients(credit.attention(), rollouts, logprobs, logits), 0.2 * true)
    torch.testing.assert_close(gradients(credit.uniform(), rollouts, logprobs, logits), 0.5 * true)


def test_attention_on_the_right_token_is_unbiased_there():
    """The converse: α on the token that decides keeps the whole signal, whether it is the first or the last."""
    for token, share in ((0, [1.0, 0.0]), (1, [0.0, 1.0])):
        rollouts, logprobs, logits = two_tokens(token, share)
        sparse = gradients(credit.sparse(), rollouts, logprobs, logits)
        torch.testing.assert_close(gradients(credit.attention(mix=1.0), rollouts, logprobs, logits), sparse)


LONGEST = 20


def free_end():
    """Return every response of 1..20 tokens under one stopping logit; R = 1 whatever the length."""
    logit = torch.tensor(-2.0, requires_grad=True)
    stop = logit.sigmoid()
    mask = torch.ones(LONGEST, LONGEST, dtype=torch.bool).tril()
    last = torch.eye(LONGEST, dtype=torch.bool)
    last[-1, -1] = False  # token 20 is forced: no choice is made there
    logprobs = torch.where(last, stop.log(), (1 - stop).log())
    logprobs = torch.cat([logprobs[:, :-1], torch.zeros(LONGEST, 1)], dim=1)
    zeros = torch.zeros(LONGEST, LONGEST)
    rollouts = helpers.rollouts(mask, ["values"], values=zeros, scores=torch.ones(LONGEST), dirty=False)
    return rollouts, logprobs, logit


def test_uniform_pays_for_going_on_where_nothing_depends_on_the_length():
    rollouts, logprobs, logit = free_end()
    total = torch.where(rollouts.mask, logprobs, 0).sum(dim=1).exp().sum().detach()
    assert float(total) == pytest.approx(1.0, abs=1e-5), "the trajectories do not cover everything"
    assert float(gradients(credit.sparse(), rollouts, logprobs, logit)) == pytest.approx(0.0, abs=1e-5)
    assert float(gradients(credit.uniform(), rollouts, logprobs, logit)) < -0.1, "stopping should look bad"
    rewards, _ = credit.apply(credit.uniform(), rollouts)
    out = advantages.gae(lam=1.0)(rewards, segments.tokens()(rollouts), rollouts).advantages
    # at token 10, the end of ten tokens is worth 1/10; continuing to twenty is worth 11/20
    assert float(out[9, 9]) == pytest.approx(0.1) and float(out[19, 9]) == pytest.approx(0.55)


def test_a_negative_score_makes_uniform_pay_for_stopping():
    rollouts, logprobs, logit = free_end()
    object.__setattr__(rollouts, "scores", -rollouts.scores)
    assert float(gradients(credit.uniform(), rollouts, logprobs, logit)) > 0.1


@pytest.mark.parametrize("length", [256])
def test_how_much_of_a_late_score_reaches_an_early_token(length):
    """λ=.95 and V=0: sparse reaches token 0 weighted by λ^(T−1), about 2e-6; ABC by Σ λ^i·α_i."""
    mask = torch.ones(1, length, dtype=torch.bool)
    share = torch.rand(1, length, generator=torch.Generator().manual_seed(0))
    given = {"reward_attention": share, "values": torch.zeros(1, length)}
    rollouts = helpers.rollouts(mask, given, scores=torch.ones(1), **given)
    ids = segments.tokens()(rollouts)

    def first(method: credit.Credit) -> float:
        return float(advantages.gae()(credit.apply(method, rollouts)[0], ids, rollouts).advantages[0, 0])

    assert first(credit.sparse()) == pytest.approx(0.95 ** (length - 1), rel=1e-3) and first(credit.sparse()) < 3e-6
    alpha = (share / share.sum()).double()
    expected = float((alpha * 0.95 ** torch.arange(length)).sum())
    assert first(credit.attention(mix=1.0)) == pytest.approx(expected, rel=1e-4)
