"""Losses, whitening and masked reductions by hand; nothing off the mask reaches a value or a gradient."""

from __future__ import annotations

import helpers
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from apportion import losses, masking, segments
from apportion.errors import DataError

NAN = float("nan")


def assert_approx(got: torch.Tensor, expected: float) -> None:
    assert got.item() == pytest.approx(expected, abs=1e-5)


def test_clipped_policy_by_hand():
    # ratio      1.5   1.5   .5   .5   1.1  | masked: e^9
    # A            1    −1    1   −1    2   | NaN
    # −A·ρ      −1.5   1.5  −.5   .5  −2.2
    # −A·clip   −1.2   1.2  −.8   .8  −2.2    (clip .2)
    # max       −1.2   1.5  −.5   .8  −2.2  → −1.6; clipped where the right one is larger: 1st and 4th
    ratio = torch.tensor([[1.5, 1.5, 0.5, 0.5, 1.1]]).log()
    logprobs = torch.cat([ratio - 1.0, torch.tensor([[8.0]])], dim=1).requires_grad_()
    adv = torch.tensor([[1.0, -1, 1, -1, 2, NAN]])
    mask = helpers.bools([[1, 1, 1, 1, 1, 0]])
    loss, sums = losses.clipped_policy(logprobs, torch.full((1, 6), -1.0), adv, mask)
    assert_approx(loss, -1.6)
    assert_approx(sums["policy/clipfrac"], 2.0)
    # k3 = ρ − 1 − log ρ: twice .5 − .405465, twice −.5 + .693147, .1 − .095310
    assert_approx(sums["policy/approxkl"], 0.580054)
    assert_approx(sums["val/ratio"], 5.1)
    # d/dlogπ = −A·ρ where not clipped, 0 where clipped
    (grad,) = torch.autograd.grad(loss, logprobs)
    torch.testing.assert_close(grad, torch.tensor([[0.0, 1.5, -0.5, 0, -2.2, 0]]))


def test_the_first_step_of_an_update_has_ratio_one_and_the_policy_gradient():
    logprobs = torch.tensor([[-1.0, -2, -3]], requires_grad=True)
    adv = torch.tensor([[0.5, -1, 2]])
    loss, sums = losses.clipped_policy(logprobs, logprobs.detach(), adv, helpers.bools([[1, 1, 1]]))
    (grad,) = torch.autograd.grad(loss, logprobs)
    torch.testing.assert_close(grad, -adv)
    assert sums["policy/clipfrac"] == 0 and sums["policy/approxkl"] == 0 and sums["val/ratio"] == 3


def test_clipped_value_by_hand():
    # V 1 2 0, V_old .5 2 1, G 0 2.5 0, clip .2 → clipped V .7 2 .8
    # (V−G)² 1 .25 0; clipped .49 .25 .64; max 1 .25 .64; half the sum .945; the third was clipped
    values, old = torch.tensor([[1.0, 2, 0, 5]]), torch.tensor([[0.5, 2, 1, 5]])
    returns, mask = torch.tensor([[0.0, 2.5, 0, 0]]), helpers.bools([[1, 1, 1, 0]])
    loss, sums = losses.clipped_value(values, old, returns, mask)
    assert_approx(loss, 0.945)
    assert_approx(sums["loss/value_clipfrac"], 1.0)
    loss, sums = losses.clipped_value(values, old, returns, mask, clip=None)
    assert_approx(loss, 0.625)
    assert_approx(sums["loss/value_clipfrac"], 0.0)


@pytest.mark.parametrize("clip", [0.2, None])
@pytest.mark.parametrize("dirty", ["values", "old", "returns"])
def test_nothing_off_the_mask_reaches_the_value_loss_or_its_gradient(clip, dirty):
    mask = helpers.bools([[1, 1, 0, 0]])
    given = {n: torch.tensor([[1.0, 2, 3, 4]]) for n in ("values", "old", "returns")}
    given["returns"] = given["returns"] + 1
    given[dirty] = torch.where(mask, given[dirty], torch.tensor([[0, 0, NAN, float("inf")]]))
    values = given["values"].requires_grad_()
    loss, _ = losses.clipped_value(values, given["old"], given["returns"], mask, clip=clip)
    assert_approx(loss, 1.0)
    (grad,) = torch.autograd.grad(loss, values)
    torch.testing.assert_close(grad, torch.tensor([[-1.0, -1, 0, 0]]), msg=lambda m: f"{dirty} off the mask: {grad}")


@pytest.mark.parametrize("dirty", ["logprobs", "old", "advantages"])
@pytest.mark.parametrize("value", [NAN, float("-inf"), float("inf")])
def test_nothing_off_the_mask_reaches_the_policy_loss_or_its_gradient(dirty, value):
    mask = helpers.bools([[1, 0]])
    given = {"logprobs": torch.tensor([[-1.0, -1]]), "old": torch.tensor([[-1.0, -1]]), "advantages": torch.ones(1, 2)}
    given[dirty][0, 1] = value
    logprobs = given["logprobs"].requires_grad_()
    loss, sums = losses.clipped_policy(logprobs, given["old"], given["advantages"], mask)
    assert_approx(loss, -1.0)
    assert all(torch.isfinite(v) for v in sums.values())
    (grad,) = torch.autograd.grad(loss, logprobs)
    assert grad.tolist() == [[-1.0, 0.0]]


def test_entropy_ignores_banned_tokens_and_their_gradient():
    logits = torch.tensor([[0.0, 0, float("-inf")], [1.0, 1, 1]], requires_grad=True)
    got = losses.entropy_of(logits)
    torch.testing.assert_close(got, torch.tensor([2.0, 3]).log())
    (grad,) = torch.autograd.grad(got.sum(), logits)
    assert torch.isfinite(grad).all()


def test_whitening_by_hand():
    # 2 4 6 8: mean 5, unbiased variance 20/3, so (x−5)·√.15 = ∓1.161895, ∓.387298
    x, mask = torch.tensor([[2.0, NAN, 4, 6], [8, 1e9, NAN, 3]]), helpers.bools([[1, 0, 1, 1], [1, 0, 0, 0]])
    a, b = 1.161895, 0.387298
    torch.testing.assert_close(masking.whiten(x, mask), torch.tensor([[-a, 0, -b, b], [a, 0, 0, 0]]))
    kept = masking.whiten(x, mask, keep_mean=True)
    torch.testing.assert_close(kept, torch.tensor([[5 - a, 0, 5 - b, 5 + b], [5 + a, 0, 0, 0]]))
    assert torch.isfinite(masking.whiten(x, mask & False)).all()
    assert masking.masked_mean(x, mask) == 5 and masking.masked_mean(x, mask & False) == 0


def test_whitening_is_the_same_over_two_processes():
    """`reduce` gives global sums: two halves, whitened with the other half's sums added, equal the whole."""
    x, mask = torch.randn(4, 6) * 3 + 2, torch.rand(4, 6) < 0.7
    whole = masking.whiten(x, mask)
    sums = [masking.masked_sum(x[h], mask[h]) for h in (slice(0, 2), slice(2, 4))]
    mean = sum(s[0] for s in sums) / sum(s[1] for s in sums)
    for mine, other in ((slice(0, 2), slice(2, 4)), (slice(2, 4), slice(0, 2))):
        missing = [masking.masked_sum(x[other], mask[other]), masking.masked_sum((x[other] - mean) ** 2, mask[other])]
        calls = iter(missing)

        def reduce(local: torch.Tensor, calls=calls) -> torch.Tensor:
            return local + torch.stack(next(calls))

        got = masking.whiten(x[mine], mask[mine], reduce=reduce)
        torch.testing.assert_close(got, whole[mine], rtol=1e-4, atol=1e-5)


def float32_formula(x: torch.Tensor, mask: torch.Tensor, keep_mean: bool) -> torch.Tensor:
    """Return whitened float32 numbers, the sums and squares in float32."""
    count = mask.sum().float()
    mean = torch.where(mask, x, 0).sum() / count.clamp_min(1)
    square = torch.where(mask, (x - mean) ** 2, 0).sum()
    white = (x - mean) * (torch.rsqrt(square / (count - 1).clamp_min(1) + 1e-8) if count > 1 else 1.0)
    return torch.where(mask, white + mean if keep_mean else white, 0)


@pytest.mark.parametrize("keep_mean", [False, True])
def test_ordinary_float32_is_whitened_in_float32_bit_for_bit(keep_mean):
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(5, 7, generator=generator) * 10.0 ** (seed % 9 - 4) + seed % 5
        mask = torch.rand(5, 7, generator=generator) < (0.05 if seed % 8 == 7 else 0.7)
        assert torch.equal(masking.whiten(x, mask, keep_mean=keep_mean), float32_formula(x, mask, keep_mean))


@pytest.mark.parametrize("keep_mean", [False, True])
@pytest.mark.parametrize(
    ("dtype", "size", "near"),
    [
        (torch.float16, 300.0, 2e-3),  # squares beyond float16
        (torch.float16, 3e4, 2e-3),
        (torch.bfloat16, 1e30, 1e-2),
        (torch.float32, 1e19, 1e-5),  # the sum of the squares is beyond float32
        (torch.float32, 1e25, 1e-5),  # every square is
        (torch.float32, 1e38, 1e-5),  # and so is the sum
        (torch.float64, 1e100, 1e-9),
    ],
)
def test_large_numbers_have_unit_variance_as_well(dtype, size, near, keep_mean):
    generator = torch.Generator().manual_seed(0)
    x = (torch.rand(4, 30, generator=generator, dtype=torch.float64) * 2 - 1).mul(size).to(dtype)
    mask = torch.rand(4, 30, generator=generator) < 0.8
    found = masking.whiten(helpers.poison(x, mask), mask, keep_mean=keep_mean)
    exact = x[mask].double()
    expected = (exact - exact.mean()) / exact.std() + (exact.mean() if keep_mean else 0.0)
    assert found.dtype == dtype and (found[~mask] == 0).all()
    torch.testing.assert_close(found[mask].double(), expected, rtol=near, atol=near)


def test_numbers_whose_squares_no_float_holds_are_an_error():
    x, mask = torch.tensor([[1e200, -1e200, NAN]], dtype=torch.float64), helpers.bools([[1, 1, 0]])
    with pytest.raises(DataError, match=r"numbers to whiten: got 1e\+200; expected numbers with a finite variance"):
        masking.whiten(x, mask)
    assert torch.isnan(masking.whiten(torch.tensor([[1.0, NAN]]), helpers.bools([[1, 1]]))).all()  # named elsewhere


@given(seed=st.integers(0, 10_000), rows=st.integers(1, 4), length=st.integers(1, 9))
def test_segment_sum_and_spread_against_loops(seed, rows, length):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 2, (rows, length), generator=generator).cumsum(dim=1)
    ids = ids - ids[:, :1]
    mask = torch.rand(rows, length, generator=generator) < 0.7
    ids = torch.where(mask, ids, -1)
    x = helpers.poison(torch.randn(rows, length, generator=generator), mask)
    sums = masking.segment_sum(x, ids)
    assert sums.shape == (rows, max(int(ids.max()) + 1, 1))
    for i in range(rows):
        for s in range(sums.shape[1]):
            expected = sum(float(x[i, t]) for t in range(length) if ids[i, t] == s)
            assert float(sums[i, s]) == pytest.approx(expected, abs=1e-5)
    back = masking.spread(sums, ids)
    for i in range(rows):
        for t in range(length):
            assert back[i, t] == (sums[i, ids[i, t]] if mask[i, t] else 0)


@given(seed=st.integers(0, 10_000), rows=st.integers(1, 4), length=st.integers(1, 9))
def test_last_first_and_placing_against_loops(seed, rows, length):
    mask = torch.rand(rows, length, generator=torch.Generator().manual_seed(seed)) < 0.4
    placed = masking.place_on_last(torch.arange(rows) + 1.0, mask)
    ids = segments.tokens()(helpers.rollouts(mask, seed=seed))
    for i, row in enumerate(mask.tolist()):
        on = [t for t, m in enumerate(row) if m]
        assert masking.last_index(mask)[i] == (on[-1] if on else -1)
        assert masking.first_index(mask)[i] == (on[0] if on else 0)
        assert placed[i].tolist() == [i + 1.0 if on and t == on[-1] else 0 for t in range(length)]
        assert ids[i].tolist() == [on.index(t) if t in on else -1 for t in range(length)]
