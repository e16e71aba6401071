"""The contract of every segmenter: what ids it must give, whatever the masks, turns and evidence."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import helpers
import pytest
import torch
from examples import examples
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from apportion import Rollouts, segments
from apportion.errors import DataError
from apportion.types import Segmenter

VARIANTS: dict[str, Callable[[], Segmenter]] = {
    "ngrams(1)": lambda: segments.ngrams(1),
    "ngrams(2)": lambda: segments.ngrams(2),
    "ngrams(1000)": lambda: segments.ngrams(1000),
    "ngrams(3, reproduce)": lambda: segments.ngrams(3, reproduce="ma-rlhf-code"),
    "random_ngrams((1, 4), 7)": lambda: segments.random_ngrams((1, 4), seed=7),
    "random_ngrams([3])": lambda: segments.random_ngrams([3], seed=-1),
    "entropy(0)": lambda: segments.entropy(0),
    "parsed(2)": lambda: segments.parsed(2),
}
SEGMENTERS = {**{name: segments.find(name) for name in segments.names()}, **VARIANTS}
every_segmenter = pytest.mark.parametrize("make", SEGMENTERS.values(), ids=SEGMENTERS.keys())
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@st.composite
def batches(draw: st.DrawFn) -> tuple[Tensor, Tensor | None, int]:
    """(mask (B,T), turns (B,T) or None, seed): holes, rows without tokens and of one token, T=1; turns end anywhere."""
    length = draw(st.integers(1, 14))
    row = st.lists(st.booleans(), min_size=length, max_size=length)
    lone = st.integers(0, length - 1).map(lambda i: [j == i for j in range(length)])
    prefix = st.integers(0, length).map(lambda n: [j < n for j in range(length)])
    mask = torch.tensor(draw(st.lists(st.one_of(row, prefix, lone), min_size=1, max_size=4)), dtype=torch.bool)
    seed = draw(st.integers(0, 10_000))
    if draw(st.booleans()):
        return mask, None, seed
    changes = torch.rand(mask.shape, generator=torch.Generator().manual_seed(seed)) < 0.25
    turn = changes.cumsum(dim=1) + seed % 3  # ids of turns need not start at 0
    return mask, torch.where(mask, turn, draw(st.sampled_from((-1, 0, 99)))), seed


def rollouts_of(method: Segmenter, drawn: tuple[Tensor, Tensor | None, int]) -> Rollouts:
    """Return rollouts with what `method` needs, poisoned off the mask."""
    mask, turn, seed = drawn
    return helpers.rollouts(mask, sorted(method.needs), seed=seed, turn=turn)


def assert_kept(ids: Tensor, rollouts: Rollouts) -> None:
    """Assert the clauses one row at a time, from their words; `segments.check` is tested against this."""
    assert ids.dtype == torch.int64 and ids.shape == rollouts.mask.shape
    for i, row in enumerate(rollouts.mask):
        assert (ids[i][~row] == -1).all(), "off the mask"
        on = ids[i][row].tolist()
        assert on[:1] in ([], [0]), "from 0"
        assert all(b - a in (0, 1) for a, b in pairwise(on)), "consecutive"
        if rollouts.turn is not None:
            turns = rollouts.turn[i][row].tolist()
            pairs = list(zip(on, turns, strict=True))
            assert all(a[0] != b[0] for a, b in pairwise(pairs) if a[1] != b[1]), "across a turn"


@every_segmenter
@examples(20)
@given(drawn=batches(), dtype=st.sampled_from(DTYPES))
def test_ids_are_consecutive_and_stay_in_their_turn_and_nothing_is_mutated(make, drawn, dtype):
    method = make()
    rollouts = helpers.cast(rollouts_of(method, drawn), dtype)
    held = {k: v for k, v in vars(rollouts).items() if isinstance(v, Tensor)} | dict(rollouts.evidence)
    before = {k: v.clone() for k, v in held.items()}
    ids = method(rollouts)
    assert_kept(ids, rollouts)
    assert segments.check(ids, rollouts.mask, rollouts.turn) is ids
    for name, value in held.items():
        assert torch.equal(value.nan_to_num(7.0), before[name].nan_to_num(7.0)), f"{name} was mutated"


@every_segmenter
@examples(20)
@given(drawn=batches(), scale=st.sampled_from((-1e30, 0.0, 1e-30, 1e30)))
def test_extreme_evidence_gives_ids_like_any_other(make, drawn, scale):
    method = make()
    rollouts = rollouts_of(method, drawn)
    extreme = {k: v * scale if v.is_floating_point() else v | (scale > 0) for k, v in rollouts.evidence.items()}
    rollouts = rollouts.with_evidence(**extreme)
    assert_kept(method(rollouts), rollouts)


@every_segmenter
@examples(20)
@given(drawn=batches(), left=st.integers(0, 3), right=st.integers(0, 5))
def test_padding_rows_and_order_do_not_matter(make, drawn, left, right):
    method = make()
    rollouts = rollouts_of(method, drawn)
    ids, rows, length = method(rollouts), *rollouts.mask.shape

    wide = method(helpers.padded(rollouts, left, right))
    assert torch.equal(wide[:, :length], ids) and (wide[:, length:] == -1).all()

    alone = [method(rollouts.select(torch.tensor([i]))) for i in range(rows)]
    assert torch.equal(torch.cat(alone), ids)

    perm = torch.randperm(rows, generator=torch.Generator().manual_seed(drawn[2]))
    assert torch.equal(method(rollouts.select(perm)), ids[perm])


@every_segmenter
@examples(20)
@given(drawn=batches())
def test_what_stands_off_the_mask_does_not_matter(make, drawn):
    """Prompt, holes, padding: other ids, turns and evidence there cut the same actions."""
    method = make()
    rollouts = rollouts_of(method, drawn)
    mask = rollouts.mask
    other = rollouts_of(method, (mask, rollouts.turn, drawn[2] + 1))
    evidence = {k: torch.where(mask, v, other.evidence[k]) for k, v in rollouts.evidence.items()}
    changed = replace(
        rollouts,
        prompt_ids=rollouts.prompt_ids + 1,
        response_ids=torch.where(mask, rollouts.response_ids, other.response_ids + 1),
        turn=None if rollouts.turn is None else torch.where(mask, rollouts.turn, rollouts.turn + 5),
        evidence=evidence,
    )
    assert torch.equal(method(changed), method(rollouts))


@examples(20)
@given(drawn=batches())
def test_one_token_is_an_action_and_n_beyond_the_row_is_the_whole_response(drawn):
    rollouts = rollouts_of(segments.tokens(), drawn)
    tokens = segments.tokens()(rollouts)
    for one in (segments.ngrams(1), segments.random_ngrams([1]), segments.ngrams(1, reproduce="ma-rlhf-code")):
        assert torch.equal(one(rollouts), tokens)
    whole = segments.whole_response()(rollouts)
    length = rollouts.mask.shape[1]
    for bandit in (segments.ngrams(length), segments.random_ngrams([length])):
        assert torch.equal(bandit(rollouts), whole)
    if rollouts.turn is None:
        assert torch.equal(whole, rollouts.mask.long() - 1)
    else:
        assert torch.equal(whole, segments.turns()(rollouts))


@examples(20)
@given(drawn=batches(), at=st.integers(0, 13), value=st.integers(-2, 15))
def test_check_refuses_exactly_what_breaks_the_contract(drawn, at, value):
    rollouts = rollouts_of(segments.tokens(), drawn)
    ids = segments.ngrams(2)(rollouts)
    ids[0, at % ids.shape[1]] = value
    try:
        assert_kept(ids, rollouts)
    except AssertionError:
        with pytest.raises(DataError, match="segments of rollout 0, token"):
            segments.check(ids, rollouts.mask, rollouts.turn)
    else:
        assert segments.check(ids, rollouts.mask, rollouts.turn) is ids


MASK = helpers.bools([[1, 1, 1, 1, 1], [1, 1, 0, 1, 1]])
GOOD = torch.tensor([[0, 0, 1, 1, 2], [0, 1, -1, 1, 2]])
BROKEN = {
    "not a tensor": (GOOD.tolist(), r"segments: got 'list'; expected int64 \(B,T\) = \(2, 5\)"),
    "floats": (GOOD.float(), r"segments: got 'torch.float32 \(2, 5\)'"),
    "one row less": (GOOD[:1], r"\(1, 5\)'; expected int64 \(B,T\) = \(2, 5\)"),
    "hole": ((1, 2, 1), r"rollout 1, token 2: got .*'ids': \[0, 1, 1, 1, 2\].* -1 off the mask"),
    "no id": ((0, 3, -1), r"rollout 0, token 3: .* expected an id from 0 on the mask"),
    "not from 0": ((1, 0, 1), r"rollout 1, token 0: .* expected 0 on the row's first token"),
    "out of order": ((0, 3, 0), r"rollout 0, token 3: got .*\[0, 0, 1, 0, 2\].* expected ids that never fall"),
    "left out": ((1, 4, 3), r"rollout 1, token 4: got .*'from token': 1.* expected the id before it or one more"),
}


@pytest.mark.parametrize(("broken", "text"), BROKEN.values(), ids=BROKEN.keys())
def test_check_names_the_first_token_that_is_wrong(broken, text):
    assert segments.check(GOOD, MASK) is GOOD
    if isinstance(broken, tuple):
        row, at, value = broken
        broken = GOOD.clone()
        broken[row, at] = value
    with pytest.raises(DataError, match=text):
        segments.check(broken, MASK)


def test_check_names_the_action_that_crosses_a_turn():
    turn = torch.tensor([[0, 0, 1, 1, 2], [0, 1, 7, 2, 3]])
    with pytest.raises(DataError, match=r"rollout 1, token 3: .* expected another id in another turn"):
        segments.check(GOOD, MASK, turn)
