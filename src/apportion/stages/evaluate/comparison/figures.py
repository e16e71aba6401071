"""The figures of a comparison from its answers, log-probabilities and scores: evaluation.json."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from apportion.intervals import clustered_mean, clustered_proportion, distinct, mean_interval
from apportion.stages.evaluate.comparison.given import Answers
from apportion.stages.evaluate.comparison.likelihood import Logprobs
from apportion.stages.evaluate.comparison.opening import Comparison
from apportion.stages.evaluate.comparison.scoring import Scores
from apportion.stages.evaluate.statistics import bootstrap
from apportion.stages.evaluate.statistics.diversity import self_similarity
from apportion.stages.evaluate.statistics.length_controlled import (
    Pairs,
    difficulties,
    length_controlled,
    pairs_of,
)
from apportion.stages.evaluate.statistics.wins import win_rate, wins

REFITS = 200  # resamples in which the length-controlled win rate is fitted again


@dataclass(frozen=True)
class Results:
    """What the figures are made from, each by the name of an entry.

    Attributes:
        answers: texts and ids. own, start: log-probabilities under the policy itself, and under the start, of those
            that have them. scores: by measure first.
    """

    answers: Mapping[str, Answers]
    own: Mapping[str, Logprobs]
    start: Mapping[str, Logprobs]
    scores: Mapping[str, Scores]


def all_figures(comparison: Comparison, results: Results) -> dict[str, Any]:
    """Return evaluation.json (docs/evaluation.md)."""
    config, start = comparison.config, comparison.start.name
    names = [one.name for one in comparison.policies]
    everyone, left_out = dict[str, Any](), list[str]()
    for one in comparison.everyone:
        facts = {"source": one.given, "answers": "sampled" if one.is_model else "given"}
        everyone[one.name] = facts | _text_figures(comparison, results.answers[one.name])
        everyone[one.name] |= _likelihood_figures(comparison, results, one.name, left_out)
    tables = {key: Table(comparison, results, key) for key in results.scores}
    for name in everyone:
        everyone[name]["measures"] = {key: table.figures(name) for key, table in tables.items()}
    found = {
        "kind": "comparison",
        "start": start,
        "policies": names,
        "measures": list(tables),
        "prompts": len(comparison.contents),
        "answers_per_prompt": comparison.sampling.samples_per_prompt,
        "seed": config.seed,
        "against": config.against,
        "figures": everyone,
        "left_out": left_out,
    }
    if config.against == "all":
        found["wins"] = {key: table.matrix([start, *names]) for key, table in tables.items()}
    if comparison.buckets:
        rows = [_bucket(tables, one.name, one.places, [start, *names]) for one in comparison.buckets]
        found["buckets"] = {"by": config.bucket, "rows": rows}
    return found


class Table:
    """One measure's scores of everyone as arrays (N,K), NaN where there is none, with the answers' lengths."""

    def __init__(self, comparison: Comparison, results: Results, key: str) -> None:
        self.config, self.start = comparison.config, comparison.start.name
        self.policies = [one.name for one in comparison.policies]
        self.scores = {name: _array(rows) for name, rows in results.scores[key].items()}
        lengths = {name: [[len(text) for text in group] for group in a.texts] for name, a in results.answers.items()}
        self.lengths = {name: _array(rows) for name, rows in lengths.items()}

    def figures(self, name: str, places: Sequence[int] | None = None) -> dict[str, Any]:
        """Return mean and, against the start, difference, win rate and (over all prompts) its length-controlled one.

        Args:
            places: the prompts; None for all of them.
        """
        chosen = slice(None) if places is None else list(places)
        own, other = self.scores[name][chosen], self.scores[self.start][chosen]
        means, others = _means(own), _means(other)
        known = ~np.isnan(means)
        found: dict[str, Any] = {"prompts": int(known.sum())}
        found["mean"] = mean_interval(means[known].tolist()) if known.any() else None
        if name == self.start:
            return found
        both = known & ~np.isnan(others)
        if not both.any():
            return found | {"difference": None, "win_rate": None}
        pair = means[both], others[both]
        found["difference"] = bootstrap.difference(*pair, self.config.bootstrap, self.config.seed)
        found["win_rate"] = win_rate(wins(own, other, self.config.tie))
        if places is None:
            found["length_controlled_win_rate"] = self._controlled(name, self.start, self._difficulty(name))
        return found

    def matrix(self, names: Sequence[str]) -> dict[str, dict[str, dict[str, Any] | None]]:
        """Return the win rate of each of `names` against each other one: {row: {column: figures}}."""
        return {one: {other: self._against(one, other) for other in names if other != one} for one in names}

    def _against(self, one: str, other: str) -> dict[str, Any] | None:
        """Return the win rate of `one` against `other`; None where no prompt has scores of both."""
        found = wins(self.scores[one], self.scores[other], self.config.tie)
        if np.isnan(found.win).all():
            return None
        return win_rate(found) | {"length_controlled": self._point(one, other)}

    def _point(self, one: str, other: str) -> float | None:
        """Return a length-controlled win rate without an interval, and without the difficulty of prompts."""
        return length_controlled(self._pairs(one, other))

    def _pairs(self, one: str, other: str) -> Pairs:
        scores, lengths = self.scores, self.lengths
        return pairs_of(scores[one], scores[other], lengths[one], lengths[other], self.config.tie)

    def _difficulty(self, name: str) -> np.ndarray | None:
        others = [self._pairs(one, self.start) for one in self.policies if one != name]
        return difficulties(others, len(self.scores[name]))

    def _controlled(self, one: str, other: str, difficulty: np.ndarray | None) -> dict[str, float] | None:
        """Return the length-controlled win rate with its bootstrap interval; None where it is undefined."""
        pairs = self._pairs(one, other)
        by_prompt = [np.flatnonzero(pairs.prompt == i) for i in range(len(self.scores[one]))]

        def rate(rows: np.ndarray) -> float | None:
            chosen = np.concatenate([by_prompt[i] for i in rows])
            return length_controlled(Pairs(*(column[chosen] for column in pairs)), difficulty)

        return bootstrap.over_prompts(rate, len(by_prompt), REFITS, self.config.seed)


def _array(rows: Sequence[Sequence[float | None]]) -> np.ndarray:
    """Return rows of different lengths as (N,K), padded with NaN; None is NaN too."""
    made = np.full((len(rows), max(1, *map(len, rows))), np.nan)
    for i, row in enumerate(rows):
        for k, value in enumerate(row):
            made[i, k] = np.nan if value is None else value
    return made


def _means(scores: np.ndarray) -> np.ndarray:
    """Return the mean of each row's numbers, NaN where it has none."""
    counts = (~np.isnan(scores)).sum(axis=1)
    sums: np.ndarray = np.nansum(scores, axis=1) / np.where(counts, counts, np.nan)
    return sums


def _bucket(tables: Mapping[str, Table], name: str, places: Sequence[int], names: Sequence[str]) -> dict[str, Any]:
    figures = {one: {key: table.figures(one, places) for key, table in tables.items()} for one in names}
    return {"bucket": name, "prompts": len(places), "figures": figures}


def _text_figures(comparison: Comparison, answers: Answers) -> dict[str, Any]:
    """Return length in tokens and characters, the share of answers that were cut off, and diversity."""
    groups = answers.ids
    tokens = [float(sum(map(len, group))) for group in groups]
    counts = [len(group) for group in groups]
    characters = [float(sum(map(len, group))) for group in answers.texts]
    flat = [ids for group in groups for ids in group]
    between, within = self_similarity(groups)
    known = [[end is False for end in group if end is not None] for group in answers.ended]
    cut = clustered_proportion([float(sum(one)) for one in known], list(map(len, known)))
    ends = comparison.sampling.stop == "eos" and any(known)
    return {
        "length": clustered_mean(tokens, counts),
        "characters": clustered_mean(characters, counts),
        "cut": cut if ends else None,
        "distinct": {str(n): distinct(flat, n) for n in (1, 2, 3)},
        "self_similarity": between,
        "self_similarity_of_a_prompt": within,
    }


def _likelihood_figures(comparison: Comparison, results: Results, name: str, left_out: list[str]) -> dict[str, Any]:
    """Return KL to the start and perplexity under it; what there is none of is None, and named in `left_out`."""
    found: dict[str, Any] = dict.fromkeys(("kl", "kl_token", "kl_k3_token", "perplexity"))
    if name not in results.start:
        left_out.append(f"KL and perplexity of {name}: the start is a file of answers, not a model.")
        return found
    start = results.start[name]
    sums = [-math.fsum(map(math.fsum, group)) for group in start]
    tokens = [sum(map(len, group)) for group in start]
    surprise = clustered_mean(sums, tokens)
    found["perplexity"] = {key: math.exp(min(value, 700.0)) for key, value in surprise.items()}
    if name == comparison.start.name:
        return found
    if name not in results.own:
        left_out.append(f"KL of {name}: {_why(comparison, name)}.")
        return found
    gaps = [
        [[a - b for a, b in zip(x, y, strict=True)] for x, y in zip(own, other, strict=True)]
        for own, other in zip(results.own[name], start, strict=True)
    ]
    k1 = [math.fsum(map(math.fsum, group)) for group in gaps]
    k3 = [math.fsum(math.expm1(min(-gap, 700.0)) + gap for answer in group for gap in answer) for group in gaps]
    found["kl"] = clustered_mean(k1, [len(group) for group in gaps])
    found["kl_token"], found["kl_k3_token"] = clustered_mean(k1, tokens), clustered_mean(k3, tokens)
    return found


def _why(comparison: Comparison, name: str) -> str:
    """Return why a policy has no KL to the start."""
    if name in comparison.foreign:
        return "its tokenizer is not the start's"
    return "its file has no log-probabilities in the start's tokens"
