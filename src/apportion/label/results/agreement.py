"""Agreement of annotators on the items that several of them ranked: Krippendorff's alpha and Kendall's tau."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from typing import NamedTuple

from apportion.intervals import Interval, mean_interval

Ranks = Sequence[int | None]
Distance = Callable[[int, int], float]
ByItem = Mapping[str, Mapping[str, Ranks]]  # item -> annotator -> ranks (K,)


class PairTau(NamedTuple):
    """Kendall's tau-b of two annotators on one item; None where one of them tied everything, or fewer than two answers
    were judged by both."""

    item: str
    one: str
    two: str
    tau: float | None


def shared(rankings: ByItem) -> dict[str, Mapping[str, Ranks]]:
    """Return the items that two or more annotators ranked."""
    return {item: by for item, by in rankings.items() if len(by) > 1}


def alpha_of_ranks(rankings: ByItem) -> float | None:
    """Return Krippendorff's alpha of the ranks, an ordinal variable whose units are the answers of shared items.

    1 is perfect agreement, 0 is chance, negative is systematic disagreement; None where it is not defined (no shared
    item, or all values equal). "Cannot judge" is a missing value. (Krippendorff 2011, by NLTK.)
    """
    units = [
        {name: ranks[i] for name, ranks in by.items()}
        for by in shared(rankings).values()
        for i in range(len(next(iter(by.values()))))
    ]
    return _alpha(units, _ordinal)


def alpha_of_pairs(rankings: ByItem) -> float | None:
    """Return Krippendorff's alpha of preferences, a nominal variable whose units are the pairs of a shared item's
    answers: the first is better, the second is better, or they are tied; None where it is not defined."""
    units = [
        {name: _preference(ranks[i], ranks[j]) for name, ranks in by.items()}
        for by in shared(rankings).values()
        for i, j in combinations(range(len(next(iter(by.values())))), 2)
    ]
    return _alpha(units, _nominal)


def pair_taus(rankings: ByItem) -> list[PairTau]:
    """Return tau-b of every two annotators of every shared item."""
    return [
        PairTau(item, one, two, kendall_tau(by[one], by[two]))
        for item, by in shared(rankings).items()
        for one, two in combinations(sorted(by), 2)
    ]


def kendall_tau(one: Ranks, two: Ranks) -> float | None:
    """Return tau-b of two rankings (K,) over the answers that both judged; None where it is not defined."""
    from scipy.stats import kendalltau

    both = [(a, b) for a, b in zip(one, two, strict=True) if a is not None and b is not None]
    if len(both) < 2:
        return None
    value = float(kendalltau([a for a, _ in both], [b for _, b in both]).statistic)
    return None if value != value else value  # NaN: one of them tied everything


def mean_tau(taus: Sequence[PairTau], annotator: str | None = None) -> Interval | None:
    """Return {mean, low, high} of the defined taus, of one annotator or of all; None where there is none."""
    values = [t.tau for t in taus if t.tau is not None and annotator in (None, t.one, t.two)]
    return mean_interval(values) if values else None


def _preference(first: int | None, second: int | None) -> int | None:
    if first is None or second is None:
        return None
    return (first > second) - (first < second)


def _alpha(units: Sequence[Mapping[str, int | None]], distance_of: Callable[[Sequence[int]], Distance]) -> float | None:
    """Return alpha of values by annotator in each unit; `distance_of` makes the distance from all comparable values."""
    from nltk.metrics.agreement import AnnotationTask  # slow to import

    given = [{name: value for name, value in unit.items() if value is not None} for unit in units]
    comparable = [unit for unit in given if len(unit) > 1]
    values = [value for unit in comparable for value in unit.values()]
    if len(set(values)) < 2:
        return None
    data = [(name, str(i), value) for i, unit in enumerate(comparable) for name, value in unit.items()]
    return float(AnnotationTask(data, distance=distance_of(values)).alpha())


def _ordinal(values: Sequence[int]) -> Distance:
    """Return the ordinal distance: the square of how many values lie between two, each end counted by half."""
    counts = Counter(values)

    def distance(one: int, two: int) -> float:
        low, high = sorted((one, two))
        between = sum(counts[value] for value in range(low, high + 1))
        return (between - (counts[low] + counts[high]) / 2) ** 2

    return distance


def _nominal(_: Sequence[int]) -> Distance:
    """Return the nominal distance: 1 for different values."""
    return lambda one, two: float(one != two)
