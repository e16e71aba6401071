"""Accuracies of both sides and of length alone, with intervals clustered by prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from apportion.intervals import clustered_mean, clustered_proportion
from apportion.stages.reward.ranked_evaluation import CLOSE, Pair
from benchmarks.reward_preferences.sides import SIDES


def pairs_in(result: Mapping[str, Any]) -> list[Pair]:
    """Return the judged pairs of one model."""
    return [Pair(*pair) for pair in result["pairs"]]


def summary(folds: Sequence[Sequence[Pair]]) -> dict[str, dict[str, float]]:
    """Return accuracy and length_only over all pairs, and over those of nearly one length, clustered by prompt."""
    pairs = _distinct(folds)
    near = [(key, pair) for key, pair in pairs if abs(pair.longer) <= CLOSE * pair.length]
    return {
        "accuracy": _share([(key, pair.right) for key, pair in pairs]),
        "length_only": _share([(key, pair.by_length) for key, pair in pairs]),
        "near": _share([(key, pair.right) for key, pair in near]),
        "near_length_only": _share([(key, pair.by_length) for key, pair in near]),
    }


def difference(folds: Sequence[Sequence[Pair]], others: Sequence[Sequence[Pair]]) -> dict[str, float]:
    """Return the difference of two sides' accuracies on the same pairs, clustered by prompt."""
    sums, counts = dict[tuple[int, int], float](), dict[tuple[int, int], int]()
    for (key, one), (_, other) in zip(_distinct(folds), _distinct(others), strict=True):
        sums[key] = sums.get(key, 0.0) + one.right - other.right
        counts[key] = counts.get(key, 0) + 1
    return dict(clustered_mean(list(sums.values()), list(counts.values())))


def _distinct(folds: Sequence[Sequence[Pair]]) -> list[tuple[tuple[int, int], Pair]]:
    """Return every pair with a key of its prompt over all folds."""
    return [((number, pair.prompt), pair) for number, pairs in enumerate(folds) for pair in pairs]


def _share(hits: Sequence[tuple[tuple[int, int], float]]) -> dict[str, float]:
    right, counts = dict[tuple[int, int], float](), dict[tuple[int, int], int]()
    for key, hit in hits:
        right[key] = right.get(key, 0.0) + hit
        counts[key] = counts.get(key, 0) + 1
    return dict(clustered_proportion(list(right.values()), list(counts.values()))) | {"pairs": len(hits)}


def shown(interval: Mapping[str, float]) -> str:
    """Return an interval as text, in percent."""
    return f"{interval['mean']:.1%} [{interval['low']:.1%}, {interval['high']:.1%}]"


def print_table(sides: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Print what each side reached, length alone, and the paired difference over the folds that both have."""
    folds = {side: {one["fold"]: pairs_in(one) for one in runs} for side, runs in sides.items() if runs}
    for side, runs in folds.items():
        found = summary([runs[fold] for fold in sorted(runs)])
        print(
            f"{side:5} {len(runs)} folds, {int(found['accuracy']['pairs'])} pairs: {shown(found['accuracy'])}; "
            f"length alone {shown(found['length_only'])}; within {CLOSE:.0%} of each other's length "
            f"({int(found['near']['pairs'])}): {shown(found['near']) if found['near']['pairs'] else 'none'}, "
            f"{sum(one['seconds'] for one in sides[side]):.0f} s"
        )
    shared = sorted(set.intersection(*(set(runs) for runs in folds.values()))) if set(folds) == set(SIDES) else []
    if shared:
        ours, trl = ([folds[side][fold] for fold in shared] for side in SIDES)
        print(f"ours − trl over folds {', '.join(map(str, shared))}: {shown(difference(ours, trl))}")
