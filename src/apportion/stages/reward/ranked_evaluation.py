"""Evaluation of a reward model on held-out rankings: accuracy of its pairs by several measures, beside length alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from apportion.config import RewardConfig
from apportion.intervals import calibration, clustered_mean, clustered_proportion, mean_interval
from apportion.models.reward import RewardModel, load_reward
from apportion.stages.reward.evaluation import scored
from apportion.stages.reward.excerpts import Excerpt, RankedExcerpts
from apportion.stages.reward.ranked_inputs import counted_excerpts

CLOSE = 0.1  # lengths that differ by at most this share of the longer one are alike
GAPS = (0.5, 1.0, 2.0)  # edges of the groups by score difference


class Pair(NamedTuple):
    """A held-out pair: its prompt's number, the winner's advantage in R, length (tokens) and ranks, and its length.

    Attributes:
        length: of the longer one, tokens.
    """

    prompt: int
    score: float
    longer: int
    ranks: int
    length: int

    @property
    def right(self) -> float:
        """1 where the winner has the higher score, ½ where both have the same."""
        return 0.5 if self.score == 0 else float(self.score > 0)

    @property
    def by_length(self) -> float:
        """1 where the winner is longer, ½ where both are equally long."""
        return 0.5 if self.longer == 0 else float(self.longer > 0)


def evaluate_rankings(folder: Path, held_out: Sequence[RankedExcerpts], config: RewardConfig) -> dict[str, Any]:
    """Return accuracy on pairs with intervals over prompts, by rank gap, score gap and length, and calibration.

    Beside each accuracy stands that of length alone: the longer answer is the better one. Intervals are clustered by
    prompt, since pairs of one ranking share their completions.
    """
    loading: dict[str, Any] = {"dtype": config.dtype, "device": config.device, "fast_kernels": config.fast_kernels}
    reward = load_reward(str(folder), **loading, field="model")
    flat = [excerpt for unit in held_out for excerpt in unit.completions]
    scores = scored(reward, flat)
    parts = scores.split([len(unit.completions) for unit in held_out])
    pairs = pairs_of(held_out, parts)
    gaps = torch.tensor([pair.score for pair in pairs])
    both = torch.sigmoid(torch.cat([gaps, -gaps])).tolist()
    bins, error = calibration(both, [1] * len(pairs) + [0] * len(pairs))
    lengths = [torch.tensor(unit.lengths).float() for unit in held_out]
    return {
        **_figures(pairs),
        "gain_over_length": _gain(pairs),
        "by_rank_gap": _groups(pairs, lambda pair: str(pair.ranks) if pair.ranks < 3 else "3 or more"),
        "by_score_gap": _groups(pairs, _score_gap),
        "by_length_difference": _groups(pairs, _length_group),
        "calibration": bins,
        "ece": error,
        "length_correlation": correlation(scores, torch.cat(lengths)),
        "length_correlation_within_prompt": correlation(_centred(parts), _centred(lengths)),
        "score_mean": float(scores.mean()),
        "score_sd": float(scores.std(unbiased=False)),
        "score_interval": mean_interval(scores.tolist()),
        "rankings": len(held_out),
        "prompts": len(set(_prompts(held_out))),
        "texts": len(flat),
        "max_tokens": config.preferences.max_tokens,
    }


def pairs_of(held_out: Sequence[RankedExcerpts], scores: Sequence[Tensor]) -> list[Pair]:
    """Return the pairs of rankings whose completions have `scores`, (K,) each."""
    found = []
    for prompt, unit, own in zip(_prompts(held_out), held_out, scores, strict=True):
        for ranks in unit.ranks:
            steps = {rank: i for i, rank in enumerate(sorted({rank for rank in ranks if not math.isnan(rank)}))}
            for winner, loser in unit._replace(ranks=[ranks]).pairs:
                gap, lengths = float(own[winner] - own[loser]), (unit.lengths[winner], unit.lengths[loser])
                apart = steps[ranks[loser]] - steps[ranks[winner]]
                found.append(Pair(prompt, gap, lengths[0] - lengths[1], apart, max(lengths)))
    return found


def _prompts(held_out: Sequence[RankedExcerpts]) -> list[int]:
    """Return a number for the prompt of each ranking."""
    known: dict[str, int] = {}
    return [known.setdefault(unit.prompt, len(known)) for unit in held_out]


def _figures(pairs: Sequence[Pair]) -> dict[str, Any]:
    """Return {accuracy, length_only, pairs} of some pairs."""
    right, longer, counts = ([0.0] * (1 + max(p.prompt for p in pairs)) for _ in range(3))
    for pair in pairs:
        right[pair.prompt] += pair.right
        longer[pair.prompt] += pair.by_length
        counts[pair.prompt] += 1
    whole = [int(count) for count in counts]
    accuracy, length_only = (clustered_proportion(hits, whole) for hits in (right, longer))
    return {"accuracy": accuracy, "length_only": length_only, "pairs": len(pairs)}


def _gain(pairs: Sequence[Pair]) -> dict[str, float]:
    """Return the difference of the two accuracies, paired."""
    sums, counts = dict[int, float](), dict[int, int]()
    for pair in pairs:
        sums[pair.prompt] = sums.get(pair.prompt, 0.0) + pair.right - pair.by_length
        counts[pair.prompt] = counts.get(pair.prompt, 0) + 1
    return clustered_mean(list(sums.values()), list(counts.values()))


def _groups(pairs: Sequence[Pair], name: Callable[[Pair], str]) -> dict[str, Any]:
    """Return {group: figures}, the groups in alphabetical order."""
    grouped: dict[str, list[Pair]] = {}
    for pair in pairs:
        grouped.setdefault(name(pair), []).append(pair)
    return {key: _figures(grouped[key]) for key in sorted(grouped)}


def _score_gap(pair: Pair) -> str:
    edges = (0.0, *GAPS)
    low = max(edge for edge in edges if edge <= abs(pair.score))
    return f"{low:g} or more" if low == GAPS[-1] else f"{low:g} to {edges[edges.index(low) + 1]:g}"


def _length_group(pair: Pair) -> str:
    if abs(pair.longer) <= CLOSE * pair.length:
        return f"within {CLOSE:.0%}"
    return "winner longer" if pair.longer > 0 else "winner shorter"


def correlation(x: Tensor, y: Tensor) -> float:
    """Return Pearson's correlation of x and y (N,); 0 where either is constant."""
    x, y = x.double() - x.double().mean(), y.double() - y.double().mean()
    size = float(x.norm() * y.norm())
    return float(x @ y) / size if size > 0 else 0.0


def _centred(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat([part.double() - part.double().mean() for part in parts])


def mean_reward(reward: RewardModel, excerpts: Sequence[Excerpt]) -> float:
    """Return the mean R of `excerpts`; equal ones are scored once and count as often as they are there."""
    different, counts = counted_excerpts(excerpts)
    weights = torch.tensor(counts, dtype=torch.float64)
    return float((scored(reward, different).double() * weights).sum() / weights.sum())
