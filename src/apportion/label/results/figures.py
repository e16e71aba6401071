"""All figures of a database's rankings, as plain data."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from statistics import median, quantiles
from typing import Any

from apportion.label.results import agreement, bias
from apportion.label.store import Store, rankings
from apportion.label.store.reading import Ranking, totals

WORST = 12  # items with the least agreement that are listed


def results(store: Store) -> dict[str, Any]:
    """Return the figures of a database: totals, agreement, position and length bias, annotators, disagreements."""
    answers = [one for one in rankings(store, every=True) if one.status != "replaced"]
    refused = sum(one.status == "refused" for one in answers)
    current = [one for one in answers if one.status == "current"]
    return figures(current) | {"totals": totals(store) | {"refused": refused}}


def figures(current: Sequence[Ranking]) -> dict[str, Any]:
    """Return the figures of current answers: rankings and skipped items."""
    ranked = [one for one in current if one.ranks is not None]
    by_item: dict[str, dict[str, list[int | None]]] = defaultdict(dict)
    for one in ranked:
        by_item[one.item][one.annotator] = one.ranks or []
    taus = agreement.pair_taus(by_item)
    return {
        "ranked": len(ranked),
        "skipped": len(current) - len(ranked),
        "agreement": {
            "items": len(agreement.shared(by_item)),
            "alpha_ranks": agreement.alpha_of_ranks(by_item),
            "alpha_pairs": agreement.alpha_of_pairs(by_item),
            "tau": agreement.mean_tau(taus),
            "tau_undefined": sum(t.tau is None for t in taus),
            "taus": [t.tau for t in taus if t.tau is not None],
        },
        "positions": [one._asdict() for one in bias.position_bias(ranked)],
        "length": bias.length_bias(ranked),
        "seconds": [one.seconds for one in ranked],
        "times": _times(ranked),
        "annotators": [_annotator(name, current, taus) for name in sorted({one.annotator for one in current})],
        "disagreements": _disagreements(ranked, taus),
    }


def _times(ranked: Sequence[Ranking]) -> list[float]:
    return sorted(one.created for one in ranked)


def _annotator(name: str, current: Sequence[Ranking], taus: Sequence[agreement.PairTau]) -> dict[str, Any]:
    """Return the figures of one annotator."""
    own = [one for one in current if one.annotator == name]
    ranked = [one for one in own if one.ranks is not None]
    seconds = [one.seconds for one in ranked]
    judged = [rank for one in ranked for rank in one.ranks or ()]
    return {
        "name": name,
        "ranked": len(ranked),
        "skipped": len(own) - len(ranked),
        "seconds": median(seconds) if seconds else None,
        "quartiles": quantiles(seconds, n=4) if len(seconds) > 1 else None,
        "ties": _share(len(set(r)) < len(r) for r in ([x for x in one.ranks or () if x] for one in ranked)),
        "cannot_judge": _share(rank is None for rank in judged),
        "first_excess": bias.first_place_excess(ranked),
        "length": bias.length_bias(ranked),
        "tau": agreement.mean_tau(taus, name),
    }


def _share(flags: Iterable[bool]) -> float | None:
    listed = list(flags)
    return sum(listed) / len(listed) if listed else None


def _disagreements(ranked: Sequence[Ranking], taus: Sequence[agreement.PairTau]) -> list[dict[str, Any]]:
    """Return the shared items with the lowest mean tau, with everybody's ranks."""
    values: dict[str, list[float]] = defaultdict(list)
    for one in taus:
        if one.tau is not None:
            values[one.item].append(one.tau)
    worst = sorted(((sum(v) / len(v), item) for item, v in values.items()))[:WORST]
    found = []
    for tau, item in worst:
        by = [one for one in ranked if one.item == item]
        if tau < 1:
            ranks = {one.annotator: one.ranks for one in by}
            texts = {"prompt": by[0].prompt, "completions": by[0].completions}
            found.append({"item": item, "tau": tau, "ranks": ranks} | texts)
    return found
