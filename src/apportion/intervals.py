"""Confidence intervals (95%) and simple statistics of reported numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence

Z = 1.959963984540054  # two-sided 95% of the normal distribution
Interval = dict[str, float]


def proportion(hits: int, count: int) -> Interval:
    """Return {mean, low, high} of a proportion, Wilson's 95% interval (Wilson 1927)."""
    return _wilson(hits / count, count) if count else {"mean": 0.0, "low": 0.0, "high": 1.0}


def _wilson(p: float, count: float) -> Interval:
    z2 = Z * Z
    centre = (p + z2 / (2 * count)) / (1 + z2 / count)
    half = Z * math.sqrt(p * (1 - p) / count + z2 / (4 * count * count)) / (1 + z2 / count)
    return {"mean": p, "low": max(0.0, centre - half), "high": min(1.0, centre + half)}


def clustered_proportion(hits: Sequence[float], counts: Sequence[int]) -> Interval:
    """Return {mean, low, high} of Σ hits / Σ counts, a 95% interval that knows that answers of a cluster go together.

    Wilson's interval at the effective number of answers, p·(1−p) over the variance of the ratio between clusters
    (Kish 1965; Korn and Graubard 1998): never more than the answers, and the number of clusters where all agree.

    Args:
        hits: of each cluster. counts: its answers.
    """
    total, clusters = sum(counts), sum(count > 0 for count in counts)
    if not total:
        return {"mean": 0.0, "low": 0.0, "high": 1.0}
    p = sum(hits) / total
    variance = _between(hits, counts, p)
    effective = p * (1 - p) / variance if variance > 0 and 0 < p < 1 else clusters
    return _wilson(p, min(effective, total) if clusters > 1 else 1)


def clustered_mean(sums: Sequence[float], counts: Sequence[int]) -> Interval:
    """Return {mean, low, high} of Σ sums / Σ counts, a normal 95% interval from the variance between clusters."""
    total = sum(counts)
    if not total:
        return {"mean": 0.0, "low": 0.0, "high": 0.0}
    mean = sum(sums) / total
    half = Z * math.sqrt(_between(sums, counts, mean))
    return {"mean": mean, "low": mean - half, "high": mean + half}


def _between(sums: Sequence[float], counts: Sequence[int], mean: float) -> float:
    """Return the variance of the ratio Σ sums / Σ counts between clusters, by linearisation."""
    clusters = sum(count > 0 for count in counts)
    spread = sum((s - mean * n) ** 2 for s, n in zip(sums, counts, strict=True))
    return clusters / max(1, clusters - 1) * spread / sum(counts) ** 2


def mean_interval(values: Sequence[float]) -> Interval:
    """Return {mean, low, high} of the mean, normal 95% interval from the sample's standard error."""
    n = len(values)
    mean = sum(values) / n
    sd = math.sqrt(sum((v - mean) ** 2 for v in values) / max(1, n - 1))
    half = Z * sd / math.sqrt(n)
    return {"mean": mean, "low": mean - half, "high": mean + half}


def calibration(probabilities: Sequence[float], labels: Sequence[int], bins: int = 10) -> tuple[list[Interval], float]:
    """Return (bins with mean confidence, accuracy and count; expected calibration error) of P(positive)."""
    groups: list[list[tuple[float, int]]] = [[] for _ in range(bins)]
    for p, y in zip(probabilities, labels, strict=True):
        groups[min(bins - 1, int(p * bins))].append((p, y))
    rows = [
        {
            "confidence": sum(p for p, _ in group) / len(group),
            "accuracy": sum(y for _, y in group) / len(group),
            "count": len(group),
        }
        for group in groups
        if group
    ]
    error = sum(r["count"] * abs(r["confidence"] - r["accuracy"]) for r in rows) / max(1, len(labels))
    return rows, error


def distinct(rows: Sequence[Sequence[int]], n: int = 2) -> float:
    """Return distinct-n: different n-grams over all n-grams of the rows together (Li et al. 2016)."""
    grams = [tuple(row[i : i + n]) for row in rows for i in range(len(row) - n + 1)]
    return len(set(grams)) / max(1, len(grams))
