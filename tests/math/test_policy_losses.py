"""Every policy loss by hand, against a slow loop in float64, and in the limits where losses must agree."""

from __future__ import annotations

import math
from collections.abc import Callable

import helpers
import pytest
import slow_losses
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from apportion import Rollouts, advantages, losses, segments
from apportion.errors import ConfigError, DataError
from apportion.types import PolicyLoss

NAN = float("nan")
LOSSES: dict[str, Callable[[], PolicyLoss]] = {
    **losses.METHODS,
    "ppo(action)": lambda: losses.ppo(ratio="action"),
    "grpo(kl)": lambda: losses.grpo(kl_coef=0.3),
    "dr_grpo(kl, length)": lambda: losses.dr_grpo(kl_coef=0.3, length=7),
    "dapo(.1, .5)": lambda: losses.dapo(0.1, 0.5),
    "gspo(wide)": lambda: losses.gspo(0.1, 0.2),
    "gspo(token)": lambda: losses.gspo(0.1, 0.2, token=True),
    "cispo(tight)": lambda: losses.cispo(0.3, 0.2),
}
every_loss = pytest.mark.parametrize("name", LOSSES)

# ratio 1.5 .5 1.1 | 1 2 and a masked position; actions {0,1},{2} | {0,1}
RATIO = [[1.5, 0.5, 1.1], [1.0, 2.0, NAN]]
ADVANTAGES = [[1.0, -2, 2], [-1, 0.5, NAN]]
ACTIONS = [[0, 0, 1], [0, 0, -1]]
# π_ref/π = 2 .5 1 | 1 .5, so k3 = .306853 .193147 0 | 0 .193147
REFERENCE = [[2.0, 0.5, 1], [1, 0.5, NAN]]
# log π = −1 + log ratio: −.594535 −1.693147 −.904690 | −1 −.306853
TABLE = {  # loss: (sum, denominator, tokens clipped, sum of the ratios used), each sum written out
    # −A·ρ −1.5 1 −2.2 | 1 −1; clipped to .8..1.2: −1.2 1.6 −2.2 | 1 −.6; the larger: −1.2 1.6 −2.2 | 1 −.6
    "ppo": (losses.ppo(), -1.4, 5, 3, 6.1),
    # ρ .75 | 1.1 | 2, A −.5 | 2 | −.25: max(.375, .4) −2.2 max(.5, .3)
    "ppo(action)": (losses.ppo(ratio="action"), -1.3, 3, 2, 6.6),
    # (−1.2 + 1.6 − 2.2)/3 + (1 − .6)/2
    "grpo": (losses.grpo(), -0.4, 2, 3, 6.1),
    # − .4 + .1·((.306853 + .193147)/3 + .193147/2)
    "grpo(kl)": (losses.grpo(kl_coef=0.1), -0.373676, 2, 3, 6.1),
    "dr_grpo": (losses.dr_grpo(), -1.4, 2, 3, 6.1),
    "dr_grpo(4, kl)": (losses.dr_grpo(length=4, kl_coef=0.1), -1.4 + 0.0693147, 8, 3, 6.1),
    # .8..1.28: −1.28 1.6 −2.2 | 1 −.64
    "dapo": (losses.dapo(), -1.52, 5, 3, 6.1),
    # s = .825^(1/3) = .937889, √2; A = 1/3, −.25: −.312630 (clip: −.333233) + .353553 (clip: .2501)
    "gspo": (losses.gspo(), 0.040924, 2, 0, 3 * 0.937889 + 2 * 1.414214),
    # (−.937889 + 1.9994 − 1.875778)/3 + (1.414214 − .5002)/2, the second and the last clipped
    "gspo(token)": (losses.gspo(token=True), 0.185585, 2, 2, 3 * 0.937889 + 2 * 1.414214),
    # −w·A·log π with w 1.5 .5 1.1 1 2: .891802 −1.693147 1.990318 −1 .306853
    "cispo": (losses.cispo(), 0.495826, 5, 0, 6.1),
    # w at most 1.4, at least .8: .832349 −2.709035 1.990318 −1 .214797
    "cispo(.2, .4)": (losses.cispo(0.2, 0.4), -0.671571, 5, 3, 6.1),
    # −A·log π: .594535 −3.386294 1.809380 −1 .153427
    "reinforce": (losses.reinforce(), -1.828952, 5, 0, 6.1),
}


def example() -> tuple[Tensor, Rollouts, Tensor, Tensor, Tensor]:
    """Return (log π, rollouts, advantages, mask, actions) of the table."""
    ratio, reference = torch.tensor(RATIO), torch.tensor(REFERENCE)
    mask, logprobs = ~ratio.isnan(), ratio.log() - 1.0
    rollouts = helpers.rollouts(
        mask,
        ["reference_logprobs"],
        logprobs=torch.where(mask, -1.0, NAN),
        reference_logprobs=logprobs + reference.log(),
    )
    return logprobs, rollouts, torch.tensor(ADVANTAGES), mask, torch.tensor(ACTIONS)


@pytest.mark.parametrize("name", TABLE)
def test_by_hand(name):
    method, total, count, clipped, ratios = TABLE[name]
    logprobs, rollouts, adv, mask, ids = example()
    logprobs.requires_grad_()
    loss, sums = method.terms(logprobs, rollouts, adv, mask, ids)
    assert loss.item() == pytest.approx(total, abs=2e-5)
    assert float(method.denominator(mask, ids)) == count
    assert float(sums["policy/clipfrac"]) == clipped
    assert float(sums["val/ratio"]) == pytest.approx(ratios, abs=1e-4)
    # k3 = ρ − 1 − log ρ: .094535 .193147 .004690 0 .306853, whatever ratio the loss uses
    assert float(sums["policy/approxkl"]) == pytest.approx(0.599225, abs=1e-5)
    assert sums["policy/ratio_limited"] == 0
    if "kl" in name:
        assert float(sums["policy/reference_kl"]) == pytest.approx(0.693147, abs=1e-5)
    (grad,) = torch.autograd.grad(loss, logprobs)
    assert torch.isfinite(grad).all() and grad[1, 2] == 0
    assert not any(v.requires_grad for v in sums.values())


def test_gspo_by_hand_where_the_clip_holds():
    # −A: .312630 against .9997/3 = .333233; −.353553 against −.25·1.0004 = −.2501: nothing is left to learn
    logprobs, rollouts, adv, mask, ids = example()
    loss, sums = losses.gspo().terms(logprobs.requires_grad_(), rollouts, -adv, mask, ids)
    assert loss.item() == pytest.approx(0.083133, abs=1e-5) and sums["policy/clipfrac"] == 5
    (grad,) = torch.autograd.grad(loss, logprobs)
    assert (grad == 0).all()


def test_overlong_penalty_by_hand():
    # limit 10, buffer 4: nothing up to 6, then a quarter a token, −1 from 10 on
    got = losses.overlong_penalty(torch.tensor([1, 6, 7, 9, 10, 50]), limit=10, buffer=4)
    assert got.tolist() == [0, 0, -0.25, -0.75, -1, -1] and got.dtype == torch.float32
    assert losses.overlong_penalty(torch.tensor([0, 3]), limit=3, buffer=3).tolist() == [0, -1]
    for limit, buffer in ((3, 4), (3, 0)):
        with pytest.raises(ConfigError, match="overlong_penalty"):
            losses.overlong_penalty(torch.tensor([1]), limit=limit, buffer=buffer)


# --- against loops ----------------------------------------------------------------------------------------------------


def batch(seed: int, rows: int = 5, length: int = 7, spread: float = 0.3) -> tuple[Tensor, Rollouts, Tensor, Tensor]:
    """Return (log π, rollouts, advantages, actions) in float64: holes, an empty row, poison off the mask."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(rows, length, generator=generator) < 0.7
    mask[rows // 2], mask[0, 0] = False, True

    def noise(size: float) -> Tensor:
        drawn = size * torch.randn(rows, length, generator=generator, dtype=torch.float64)
        return helpers.poison(drawn, mask)

    old = noise(1.0) - 2
    rollouts = helpers.rollouts(
        mask, ["reference_logprobs"], seed=seed, logprobs=old, reference_logprobs=old + noise(spread)
    )
    coin = torch.randint(0, 2, mask.shape, generator=generator) * mask
    ids = torch.where(mask, (coin * ~((mask.cumsum(dim=1) == 1) & mask)).cumsum(dim=1), -1)
    return (old + noise(spread)).requires_grad_(), rollouts, noise(1.0), ids


def whole(method: PolicyLoss, logprobs: Tensor, rollouts: Rollouts, adv: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Return (the loss divided by its denominator, its gradient)."""
    loss, _ = method.terms(logprobs, rollouts, adv, rollouts.mask, ids)
    loss = loss / method.denominator(rollouts.mask, ids)
    return loss.detach(), torch.autograd.grad(loss, logprobs)[0]


@every_loss
@settings(max_examples=30)
@given(seed=st.integers(0, 10_000), spread=st.sampled_from((0.0, 0.01, 0.3)))
def test_values_and_gradients_are_those_of_the_loop(name, seed, spread):
    logprobs, rollouts, adv, ids = batch(seed, rows=4, length=5, spread=spread)
    loss, grad = whole(LOSSES[name](), logprobs, rollouts, adv, ids)
    reference = rollouts.evidence["reference_logprobs"]
    expected = slow_losses.slow(name, logprobs, rollouts.old_logprobs, reference, adv, rollouts.mask, ids)
    assert loss.dtype == torch.float64
    torch.testing.assert_close(loss, expected.detach(), rtol=0, atol=1e-6)
    slope = torch.zeros_like(grad)  # stays so where every clip holds
    if expected.requires_grad:
        slope = torch.autograd.grad(expected, logprobs)[0]
    torch.testing.assert_close(grad, slope, rtol=0, atol=1e-6)


@every_loss
@given(seed=st.integers(0, 10_000))
def test_micro_batches_over_one_denominator_are_the_whole(name, seed):
    method = LOSSES[name]()
    logprobs, rollouts, adv, ids = batch(seed)
    expected, expected_grad = whole(method, logprobs, rollouts, adv, ids)
    count = method.denominator(rollouts.mask, ids)
    _, sums = method.terms(logprobs, rollouts, adv, rollouts.mask, ids)
    total, parts, counts = 0.0, [], 0.0
    for rows in torch.arange(len(rollouts)).split(2):
        part = rollouts.select(rows)
        loss, own = method.terms(logprobs[rows], part, adv[rows], part.mask, ids[rows])
        total, counts = total + loss / count, counts + method.denominator(part.mask, ids[rows])
        parts.append(own)
    assert counts == count
    torch.testing.assert_close(total.detach(), expected, rtol=0, atol=1e-9)
    torch.testing.assert_close(torch.autograd.grad(total, logprobs)[0], expected_grad, rtol=0, atol=1e-9)
    for key, value in sums.items():
        torch.testing.assert_close(sum(p[key] for p in parts), value, rtol=1e-6, atol=1e-6, msg=key)


@every_loss
@given(seed=st.integers(0, 10_000), right=st.integers(1, 4))
def test_padding_changes_nothing(name, seed, right):
    method = LOSSES[name]()
    logprobs, rollouts, adv, ids = batch(seed)
    loss, grad = whole(method, logprobs, rollouts, adv, ids)
    more = helpers.padded(rollouts, 0, right)
    new, more_adv = (torch.nn.functional.pad(x.detach(), (0, right), value=NAN) for x in (logprobs, adv))
    wide_ids = torch.nn.functional.pad(ids, (0, right), value=-1)
    wide_loss, wide_grad = whole(method, new.requires_grad_(), more, more_adv, wide_ids)
    torch.testing.assert_close(wide_loss, loss)
    torch.testing.assert_close(wide_grad[:, : grad.shape[1]], grad)
    assert (wide_grad[:, grad.shape[1] :] == 0).all()


@every_loss
@given(seed=st.integers(0, 10_000))
def test_at_ratio_one_the_gradient_is_the_policy_gradient_over_the_denominator(name, seed):
    _, rollouts, adv, ids = batch(seed)
    method, mask = LOSSES[name](), rollouts.mask
    rollouts = rollouts.with_evidence(reference_logprobs=rollouts.old_logprobs)
    if "action" in name or name in ("gspo", "gspo(wide)"):  # one advantage an action, or a row
        own = ids if "action" in name else torch.where(mask, 0, -1)
        adv = advantages.monte_carlo()(adv, own, rollouts).advantages.double()
    logprobs = rollouts.old_logprobs.clone().requires_grad_()
    _, grad = whole(method, logprobs, rollouts, adv, ids)
    expected = torch.where(mask, -adv, 0.0) / method.denominator(mask, ids)
    if name.startswith(("gspo", "grpo")):
        expected = expected / mask.sum(dim=1, keepdim=True).clamp_min(1)
    torch.testing.assert_close(grad, expected, rtol=1e-6, atol=1e-9)


@given(seed=st.integers(0, 10_000))
def test_actions_of_one_token_are_tokens(seed):
    logprobs, rollouts, adv, _ = batch(seed)
    ids = segments.tokens()(rollouts)
    one, two = (whole(losses.ppo(ratio=r), logprobs, rollouts, adv, ids) for r in ("token", "action"))
    torch.testing.assert_close(one, two, rtol=0, atol=1e-12)
    sums = [losses.ppo(ratio=r).terms(logprobs, rollouts, adv, rollouts.mask, ids)[1] for r in ("token", "action")]
    torch.testing.assert_close(sums[0], sums[1])


@given(seed=st.integers(0, 10_000))
def test_one_action_a_row_is_a_sequence_ratio(seed):
    """RLOO with the whole response as one action: −min(ρA, clip(ρ)A) with ρ = π(y)/π_old(y), a mean over rows."""
    logprobs, rollouts, adv, _ = batch(seed)
    mask = rollouts.mask
    ids = torch.where(mask, 0, -1)
    rows = mask.any(dim=1)
    adv = adv.nan_to_num(0, 0, 0)[:, :1].expand(mask.shape)
    loss, grad = whole(losses.ppo(ratio="action"), logprobs, rollouts, adv, ids)
    rho = torch.where(mask, logprobs - rollouts.old_logprobs, 0).sum(dim=1).exp()
    a = adv[:, 0]
    expected = -torch.minimum(rho * a, rho.clamp(0.8, 1.2) * a)[rows].mean()
    torch.testing.assert_close(loss, expected.detach(), rtol=0, atol=1e-9)
    torch.testing.assert_close(grad, torch.autograd.grad(expected, logprobs)[0], rtol=0, atol=1e-9)


@given(seed=st.integers(0, 10_000))
def test_losses_that_differ_in_one_thing_agree_without_it(seed):
    """DAPO with equal bounds is token PPO; equal lengths make GRPO token PPO; Dr. GRPO is a multiple of both."""
    logprobs, rollouts, adv, ids = batch(seed)
    expected = whole(losses.ppo(), logprobs, rollouts, adv, ids)
    torch.testing.assert_close(whole(losses.dapo(0.2, 0.2), logprobs, rollouts, adv, ids), expected)
    full = helpers.rollouts(rollouts.mask | True, logprobs=rollouts.old_logprobs.nan_to_num(0, 0, 0))
    new = logprobs.detach().nan_to_num(0, 0, 0).requires_grad_()
    adv = adv.nan_to_num(0, 0, 0)
    expected = whole(losses.ppo(), new, full, adv, ids)
    torch.testing.assert_close(whole(losses.grpo(), new, full, adv, ids), expected)
    torch.testing.assert_close(whole(losses.dr_grpo(length=full.mask.shape[1]), new, full, adv, ids), expected)


@given(seed=st.integers(0, 10_000))
def test_the_two_forms_of_gspo_agree_where_a_row_has_one_advantage(seed):
    logprobs, rollouts, adv, ids = batch(seed)
    adv = adv.nan_to_num(0, 0, 0)[:, :1].expand(adv.shape)
    one, two = (whole(losses.gspo(0.1, 0.2, token=t), logprobs, rollouts, adv, ids) for t in (False, True))
    torch.testing.assert_close(one, two, rtol=0, atol=1e-12)


# --- what may not leak, overflow or be unknown ------------------------------------------------------------------------


@every_loss
@pytest.mark.parametrize("gap", [100.0, 1e4])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_huge_ratio_is_finite_in_value_and_gradient_and_counted(name, gap, sign):
    method = LOSSES[name]()
    mask = helpers.bools([[1, 1, 1], [1, 1, 0]])
    old = torch.full((2, 3), -gap)
    rollouts = helpers.rollouts(mask, ["reference_logprobs"], logprobs=old, reference_logprobs=old + 1)
    logprobs = torch.tensor([[-1.0, -gap, -gap], [-2 * gap, -gap, -gap]]).requires_grad_()
    ids = segments.tokens()(rollouts)
    loss, sums = method.terms(logprobs, rollouts, torch.full((2, 3), sign), mask, ids)
    (grad,) = torch.autograd.grad(loss, logprobs)
    assert torch.isfinite(loss) and torch.isfinite(grad).all() and all(torch.isfinite(v) for v in sums.values())
    assert sums["policy/ratio_limited"] == (5 if name.startswith("gspo") else 2)


@every_loss
@pytest.mark.parametrize("dirty", ["logprobs", "old", "advantages", "reference"])
@pytest.mark.parametrize("value", [NAN, float("-inf"), float("inf")])
def test_nothing_off_the_mask_reaches_a_loss_or_its_gradient(name, dirty, value):
    method = LOSSES[name]()
    mask = helpers.bools([[1, 0, 1], [0, 0, 0]])
    given = {n: torch.full((2, 3), -1.0) for n in ("logprobs", "old", "advantages", "reference")}
    clean = {n: x.clone() for n, x in given.items()}
    given[dirty] = torch.where(mask, given[dirty], value)
    found = []
    for x in (given, clean):
        rollouts = helpers.rollouts(
            mask, ["reference_logprobs"], dirty=False, logprobs=x["old"], reference_logprobs=x["reference"]
        )
        logprobs = x["logprobs"].requires_grad_()
        loss, sums = method.terms(logprobs, rollouts, x["advantages"], mask, segments.tokens()(rollouts))
        found.append((loss.detach(), torch.autograd.grad(loss, logprobs)[0], sums))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)
    assert (found[0][1][~mask] == 0).all() and found[0][2]["val/ratio"] == 2


@every_loss
def test_half_precision_is_computed_in_float32(name):
    method = LOSSES[name]()
    logprobs, rollouts, adv, ids = batch(3)
    halves = helpers.cast(rollouts, torch.bfloat16)
    rounded = logprobs.detach().bfloat16()
    got, _ = method.terms(rounded, halves, adv.bfloat16(), rollouts.mask, ids)
    expected, _ = method.terms(
        rounded.float(), helpers.cast(halves, torch.float32), adv.bfloat16().float(), rollouts.mask, ids
    )
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_denominators_count_rows_tokens_and_actions_on_the_mask_alone():
    segment_ids = torch.tensor([[0, 0, 1, 2], [0, 1, -1, -1], [-1, -1, -1, -1], [0, 0, 1, 1]])
    mask = segment_ids >= 0
    mask[0, 2] = mask[3, 2] = mask[3, 3] = False  # an action left out, by the update's own mask
    counts = {n: float(make().denominator(mask, segment_ids)) for n, make in LOSSES.items()}
    assert counts["ppo"] == counts["dapo"] == counts["cispo"] == counts["reinforce"] == 7
    assert counts["ppo(action)"] == 5
    assert counts["grpo"] == counts["gspo"] == counts["gspo(token)"] == counts["dr_grpo"] == 3
    assert counts["dr_grpo(kl, length)"] == 21
    assert all(float(make().denominator(mask & False, segment_ids)) == 0 for make in LOSSES.values())


def test_what_each_loss_declares():
    ratios = {name: make().ratio for name, make in LOSSES.items()}
    assert ratios.pop("ppo(action)") == "action"
    assert ratios.pop("gspo") == ratios.pop("gspo(wide)") == "sequence"
    assert set(ratios.values()) == {"token"}
    needs = {name for name, make in LOSSES.items() if make().needs}
    assert needs == {"grpo(kl)", "dr_grpo(kl, length)"} and losses.grpo(kl_coef=1).needs == {"reference_logprobs"}
    assert losses.names() == ("ppo", "grpo", "dr_grpo", "dapo", "gspo", "cispo", "reinforce")


def test_the_reference_is_requested_by_name():
    logprobs, rollouts, adv, mask, ids = example()
    bare = helpers.rollouts(mask, logprobs=rollouts.old_logprobs)
    with pytest.raises(DataError, match="reference_logprobs"):
        losses.grpo(kl_coef=0.1).terms(logprobs, bare, adv, mask, ids)


@pytest.mark.parametrize(
    ("specs", "field"),
    [
        ([("ppo", {"clip": -0.1})], "ppo.clip"),
        ([("ppo", {"clip": 1.5})], "ppo.clip"),
        ([("ppo", {"ratio": "tokens"})], "ppo.ratio"),
        ([("grpo", {"kl_coef": -1})], "grpo.kl_coef"),
        ([("dr_grpo", {"length": 0})], "dr_grpo.length"),
        ([("dr_grpo", {"length": 2.5})], "dr_grpo.length"),
        ([("dapo", {"clip_high": math.nan})], "dapo.clip_high"),
        ([("gspo", {"clip_low": True})], "gspo.clip_low"),
        ([("cispo", {"clip_low": 1.01})], "cispo.clip_low"),
        ([("reinforce", {"clip": 0.2})], "loss.reinforce"),
        ([("gropo", {})], "Did you mean 'grpo'"),
        ([("ppo", {}), ("grpo", {})], "exactly one"),
        ([("apportion.losses:names", {})], "a PolicyLoss"),
    ],
)
def test_what_cannot_be_built_is_refused_by_name(specs, field):
    with pytest.raises(ConfigError) as caught:
        losses.build(specs)
    assert field in str(caught.value)


def test_built_losses_are_what_their_settings_say():
    method = losses.build([("apportion.losses.dapo:dapo", {"clip_high": 0.5})])
    logprobs, rollouts, adv, mask, ids = example()
    expected, _ = losses.dapo(clip_high=0.5).terms(logprobs, rollouts, adv, mask, ids)
    assert (
        method.terms(logprobs, rollouts, adv, mask, ids)[0]
        == expected
        != losses.dapo().terms(logprobs, rollouts, adv, mask, ids)[0]
    )
