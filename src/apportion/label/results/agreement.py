"""Agreement of annotators on the items that several of them ranked: Krippendorff's alpha and Kendall's tau."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any, NamedTuple

from apportion.intervals import Interval, mean_interval

Ranks = Sequence[int | None]
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
    item, or all values equal). "Cannot judge" is a missing value. (Krippendorff 2011, by the package krippendorff.)
    """
    units = [
        {name: ranks[i] for name, ranks in by.items()}
        for by in shared(rankings).values()
        for i in range(len(next(iter(by.values()))))
    ]
    return _alpha(units, "ordinal")


def alpha_of_pairs(rankings: ByItem) -> float | None:
    """Return Krippendorff's alpha of preferences, a nominal variable whose units are the pairs of a shared item's
    answers: the first is better, the second is better, or they are tied; None where it is not defined."""
    units = [
        {name: _preference(ranks[i], ranks[j]) for name, ranks in by.items()}
        for by in shared(rankings).values()
        for i, j in combinations(range(len(next(iter(by.values())))), 2)
    ]
    return _alpha(units, "nominal")


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


def _alpha(units: Sequence[Mapping[str, int | None]], level: Any) -> float | None:
    import krippendorff
    import numpy as np

    names = sorted({name for unit in units for name in unit})
    table = np.full((len(names), len(units)), np.nan)
    for column, unit in enumerate(units):
        for name, rank in unit.items():
            table[names.index(name), column] = np.nan if rank is None else rank
    table = table[:, np.sum(~np.isnan(table), axis=0) > 1] if units else table
    if table.size == 0 or len(np.unique(table[~np.isnan(table)])) < 2:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        value = float(krippendorff.alpha(reliability_data=table, level_of_measurement=level))
    return value if np.isfinite(value) else None
