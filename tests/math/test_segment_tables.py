"""Every segmenter by hand: ids counted on paper, rows that differ, turns and holes; random cuts by their statistics."""

from __future__ import annotations

from collections import Counter

import helpers
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from apportion import Rollouts, segments
from apportion.errors import ConfigError, DataError
from apportion.types import Segmenter

NAN = float("nan")


def ids(segment: Segmenter, mask: list[int], **more: object) -> list[int]:
    """Return the ids of one row; `more` are evidence or fields, each a row."""
    rollouts = helpers.rollouts(helpers.bools([mask]), **rows(more))
    return segment(rollouts)[0].tolist()


def rows(more: dict[str, object]) -> dict[str, object]:
    """Return keyword arguments for helpers.rollouts: fields of Rollouts as they are, everything else as evidence."""
    tensors = {k: torch.tensor([v]) for k, v in more.items()}
    fields = {k: v for k, v in tensors.items() if k in ("turn", "response_ids")}
    return {"names": [k for k in tensors if k not in fields], **tensors}


ALL = [1] * 12
NGRAMS = [
    ("fives", segments.ngrams(), ALL, {}, [0] * 5 + [1] * 5 + [2] * 2),
    ("last one alone", segments.ngrams(reproduce="ma-rlhf-code"), ALL, {}, [0] * 5 + [1] * 5 + [2, 3]),
    # 11 tokens: 5 and 5 before the last. The released code puts an empty action between: not reproduced
    ("no empty action", segments.ngrams(reproduce="ma-rlhf-code"), ALL[:11], {}, [0] * 5 + [1] * 5 + [2]),
    ("one token", segments.ngrams(reproduce="ma-rlhf-code"), [0, 1, 0], {}, [-1, 0, -1]),
    ("two tokens", segments.ngrams(reproduce="ma-rlhf-code"), [1, 1, 0], {}, [0, 1, -1]),
    ("holes do not count", segments.ngrams(2), [1, 0, 1, 1, 0, 0, 1, 1, 0], {}, [0, -1, 0, 1, -1, -1, 1, 2, -1]),
    ("turns restart the count", segments.ngrams(2), [1] * 7, {"turn": [4, 4, 4, 9, 9, 9, 9]}, [0, 0, 1, 2, 2, 3, 3]),
    ("a turn comes back", segments.ngrams(5), [1] * 5, {"turn": [0, 0, 1, 0, 0]}, [0, 0, 1, 2, 2]),
    ("a hole's turn is nothing", segments.ngrams(5), [1, 0, 1], {"turn": [0, 8, 0]}, [0, -1, 0]),
    ("two turns, last alone", segments.ngrams(2, reproduce="ma-rlhf-code"), [1] * 5, {"turn": [0] * 3 + [1] * 2},
     [0, 0, 1, 2, 3]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "segment", "mask", "more", "expected"), NGRAMS, ids=[n[0] for n in NGRAMS])
def test_ngrams(name, segment, mask, more, expected):
    assert ids(segment, mask, **more) == expected


def test_turns_and_the_whole_response():
    holes, turn = [0, 1, 1, 0, 0, 1, 0, 1], [9, 2, 2, 2, 2, 5, 5, 5]
    assert ids(segments.turns(), holes) == [-1, 0, 0, -1, -1, 1, -1, 2]
    assert ids(segments.turns(), holes, turn=turn) == [-1, 0, 0, -1, -1, 1, -1, 1]
    assert ids(segments.whole_response(), holes) == [-1, 0, 0, -1, -1, 0, -1, 0]
    assert ids(segments.whole_response(), holes, turn=turn) == [-1, 0, 0, -1, -1, 1, -1, 1]
    for segment in (segments.turns(), segments.whole_response()):
        assert ids(segment, [0, 0]) == [-1, -1]


# −log π_ref, the mean of the action so far, ids: the docstring's table, and one of its own
#   .7  .7 (mean .7, equal: joins)  .8 > .7: new  .2 (mean .5)  .5 = .5: joins  .6 > .5: new  0
PERPLEXITY = [
    ([2, 1, 1.5, 3, 3, 1, 2, 0], [0, 0, 0, 1, 1, 1, 1, 1]),
    ([0.75, 0.75, 1.0, 0.0, 0.5, 0.625, 0.0], [0, 0, 1, 1, 1, 2, 2]),
    ([1, 2, 3, 4], [0, 1, 2, 3]),
    ([4, 3, 2, 1], [0, 0, 0, 0]),
    ([0.1] * 9, [0] * 9),
]


@pytest.mark.parametrize(("surprise", "expected"), PERPLEXITY)
@pytest.mark.parametrize("hole", [False, True])
def test_perplexity(surprise, expected, hole):
    reference, mask, expected = [-float(x) for x in surprise], [1] * len(surprise), list(expected)
    if hole:
        for row, junk in ((reference, NAN), (mask, 0), (expected, -1)):
            row.insert(2, junk)
            row.append(junk)
    assert ids(segments.perplexity(), mask, reference_logprobs=reference) == expected


def test_perplexity_restarts_in_each_turn():
    reference, turn = [-2.0, -1, -1, -1.75, -1], [0, 0, 1, 1, 1]
    assert ids(segments.perplexity(), [1] * 5, reference_logprobs=reference) == [0, 0, 0, 1, 1]
    assert ids(segments.perplexity(), [1] * 5, reference_logprobs=reference, turn=turn) == [0, 0, 1, 2, 2]


@settings(max_examples=200)
@given(seed=st.integers(0, 100_000), length=st.integers(1, 20))
def test_perplexity_is_its_definition(seed, length):
    """Each row against means written out (exp rises with them); numbers are quarters, so that there are ties."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(3, length, generator=generator) < 0.8
    reference = -torch.randint(0, 12, mask.shape, generator=generator) / 4
    rollouts = helpers.rollouts(mask, ["reference_logprobs"], reference_logprobs=reference)
    got = segments.perplexity()(rollouts)
    for i in range(3):
        expected: list[list[float]] = []
        for x in (-reference[i][mask[i]]).double().tolist():
            action = expected[-1] if expected else []
            if action and sum([*action, x]) * len(action) <= sum(action) * (len(action) + 1):
                action.append(x)
            else:
                expected.append([x])
        assert got[i][mask[i]].tolist() == [k for k, action in enumerate(expected) for _ in action]


def test_entropy():
    values = [0.2, 1.8, 0.1, 0.3, 2.5, 1.75]
    assert ids(segments.entropy(), [1] * 6, entropy=values) == [0, 1, 1, 1, 2, 2]
    assert ids(segments.entropy(0.25), [1] * 6, entropy=values) == [0, 1, 1, 2, 3, 4]
    assert ids(segments.entropy(3), [1] * 6, entropy=values) == [0] * 6
    assert ids(segments.entropy(), [0, 1, 0, 1, 1, 0], entropy=[9.0, 9, 9, 9, 0, 9]) == [-1, 0, -1, 1, 1, -1]
    turn = [0, 0, 0, 1, 1, 1]
    assert ids(segments.entropy(), [1] * 6, entropy=values, turn=turn) == [0, 1, 1, 2, 3, 3]


MARKED = [("sentences", {}, "sentence_boundaries"), ("parsed", {}, "phrase_boundaries")]
MARKED += [("parsed", {"max_tokens": 3}, "phrase_boundaries@max_tokens=3")]


@pytest.mark.parametrize(("name", "kwargs", "evidence"), MARKED)
def test_sentences_and_phrases_start_where_they_are_marked(name, kwargs, evidence):
    segment = segments.find(name)(**kwargs)
    assert segment.needs == {evidence}
    mask, marks = [1, 1, 0, 1, 1, 0], [False, True, True, False, True, True]
    expected = [0, 1, -1, 1, 2, -1]  # a mark in a hole is off the mask: it starts nothing
    for made in (marks, [float(m) for m in marks]):
        assert ids(segment, mask, **{evidence: made}) == expected
        assert ids(segment, mask, boundaries=made) == expected
    other = [True] * 6
    assert ids(segment, mask, **{evidence: marks, "boundaries": other}) == expected
    assert ids(segment, mask, boundaries=marks, turn=[0, 0, 0, 1, 1, 1]) == [0, 1, -1, 2, 3, -1]


def lengths(row: Tensor) -> list[int]:
    """Return how many tokens each action of one row has, in order."""
    return row[row >= 0].bincount().tolist()


def response(seed: int, rows: int, length: int) -> Rollouts:
    """Return full rows of random ids."""
    return helpers.rollouts(torch.ones(rows, length, dtype=torch.bool), seed=seed)


def test_random_lengths_are_the_list_repeated_and_shuffled():
    """20 tokens take 2, 3, 5, 10 once each; 40 twice. On 30 tokens the last action is what is left."""
    for length, times in ((20, 1), (40, 2)):
        for row in segments.random_ngrams()(response(1, 50, length)):
            assert sorted(lengths(row)) == sorted([2, 3, 5, 10] * times)
    for row in segments.random_ngrams()(response(2, 50, 30)):
        drawn = Counter([2, 3, 5, 10] * 2)
        *full, last = lengths(row)
        drawn.subtract(full)
        assert min(drawn.values()) >= 0 and any(n > 0 and size >= last for size, n in drawn.items())


def test_random_cuts_are_uniform_over_orders():
    """20 tokens and 4 lengths: 24 orders. χ² with 23 degrees of freedom stays below 49.7 (p = .001)."""
    count = 4800
    orders = Counter(tuple(lengths(row)) for row in segments.random_ngrams()(response(3, count, 20)))
    assert len(orders) == 24
    assert sum((n - count / 24) ** 2 for n in orders.values()) / (count / 24) < 49.7


def test_random_cuts_depend_on_the_seed_and_the_ids_in_their_order():
    rollouts = response(4, 8, 60)
    cut = segments.random_ngrams()(rollouts)
    assert torch.equal(segments.random_ngrams()(rollouts), cut)
    assert len({tuple(row.tolist()) for row in cut}) == 8
    assert (segments.random_ngrams(seed=1)(rollouts) != cut).any(dim=1).all()
    swapped = rollouts.response_ids.clone()
    swapped[:, [0, 1]] = swapped[:, [1, 0]]
    changed = (swapped != rollouts.response_ids).any(dim=1)
    other = helpers.rollouts(rollouts.mask, seed=4, response_ids=swapped)
    assert changed.sum() >= 6 and (segments.random_ngrams()(other) != cut).any(dim=1)[changed].all()


def test_a_random_action_ends_with_its_turn():
    rollouts = helpers.rollouts(helpers.bools([[1] * 10]), turn=torch.tensor([[0] * 4 + [1] * 6]))
    assert segments.random_ngrams([3])(rollouts).tolist() == [[0, 0, 0, 1, 2, 2, 3, 3, 3, 4]]


WRONG_SETTINGS = [
    ("ngrams", {"n": 0}, "ngrams.n"),
    ("ngrams", {"n": 2.5}, "ngrams.n"),
    ("ngrams", {"n": True}, "ngrams.n"),
    ("ngrams", {"reproduce": "ma-rlhf"}, "Did you mean 'ma-rlhf-code'"),
    ("random_ngrams", {"lengths": []}, "random_ngrams.lengths"),
    ("random_ngrams", {"lengths": 3}, "random_ngrams.lengths"),
    ("random_ngrams", {"lengths": [2, 0]}, "random_ngrams.lengths"),
    ("random_ngrams", {"seed": 0.5}, "random_ngrams.seed"),
    ("random_ngrams", {"seed": 2**63}, "random_ngrams.seed"),
    ("entropy", {"threshold": -1}, "entropy.threshold"),
    ("entropy", {"threshold": NAN}, "entropy.threshold"),
    ("entropy", {"threshold": "high"}, "entropy.threshold"),
    ("parsed", {"max_tokens": 0}, "parsed.max_tokens"),
]


@pytest.mark.parametrize(("name", "kwargs", "text"), WRONG_SETTINGS)
def test_settings_that_cannot_work_are_refused(name, kwargs, text):
    with pytest.raises(ConfigError, match=text):
        segments.find(name)(**kwargs)


@pytest.mark.parametrize("name", ["perplexity", "entropy", "sentences", "parsed"])
def test_evidence_that_is_absent_or_wrong_is_named(name):
    segment = segments.find(name)()
    (need,) = segment.needs
    mask = helpers.bools([[1, 1, 0], [1, 1, 1]])
    with pytest.raises(DataError, match=rf"evidence\['{need}'\]: got 'no evidence'"):
        segment(helpers.rollouts(mask))
    with pytest.raises(DataError, match=rf"evidence\['{need}'\]: got \(2,\); expected shape \(2, 3\)"):
        segment(helpers.rollouts(mask, [need], **{need: torch.ones(2)}))
    for bad in (NAN, float("inf")):
        values = torch.tensor([[0.0, 1, NAN], [0, bad, 1]])
        with pytest.raises(DataError, match=rf"evidence\['{need}'\] of rollout 1, token 1"):
            segment(helpers.rollouts(mask, [need], dirty=False, **{need: values}))
