"""Intervals of answers that go together: by hand, and their coverage on random clusters."""

from __future__ import annotations

import math
import random

import pytest

from apportion.intervals import Z, clustered_mean, clustered_proportion, proportion


def wilson(p: float, n: float) -> tuple[float, float]:
    """Return the roots of (p − q)² = Z²·q·(1−q)/n in q."""
    a, b, c = 1 + Z * Z / n, -(2 * p + Z * Z / n), p * p
    root = math.sqrt(b * b - 4 * a * c)
    return (-b - root) / (2 * a), (-b + root) / (2 * a)


def test_by_hand() -> None:
    """Clusters with 2 of 2, 1 of 2 and 0 of 1 right: variance 3/2·(.8² + .2² + .6²)/5² = .0624, .24/.0624 answers."""
    found = clustered_proportion([2, 1, 0], [2, 2, 1])
    low, high = wilson(0.6, 0.24 / 0.0624)
    assert (found["mean"], found["low"], found["high"]) == pytest.approx((0.6, low, high))
    mean = clustered_mean([2, 1, 0], [2, 2, 1])
    assert (mean["low"], mean["high"]) == pytest.approx((0.6 - Z * math.sqrt(0.0624), 0.6 + Z * math.sqrt(0.0624)))
    assert clustered_proportion([3, 3], [3, 3]) == proportion(2, 2)  # two clusters that agree are two answers
    assert clustered_proportion([3], [4])["low"] == pytest.approx(wilson(0.75, 1)[0])
    assert clustered_proportion([], []) == {"mean": 0.0, "low": 0.0, "high": 1.0}
    assert clustered_mean([], []) == {"mean": 0.0, "low": 0.0, "high": 0.0}
    assert clustered_proportion([1, 0, 0], [1, 0, 1]) == clustered_proportion([1, 0], [1, 1])  # an empty one is none


def test_it_covers_where_answers_of_a_prompt_go_together() -> None:
    draw = random.Random(0)
    covered, naive = 0, 0
    for _ in range(400):
        counts = [draw.randint(1, 12) for _ in range(60)]
        chances = [draw.choice((0.35, 0.95)) for _ in counts]
        hits = [sum(draw.random() < p for _ in range(n)) for p, n in zip(chances, counts, strict=True)]
        found, plain = clustered_proportion(hits, counts), proportion(sum(hits), sum(counts))
        covered += found["low"] <= 0.65 <= found["high"]
        naive += plain["low"] <= 0.65 <= plain["high"]
    assert 0.91 < covered / 400 < 0.98 and naive / 400 < 0.8
