"""The rewards of a run: every source called once a batch, its answers logged, weighted and summed."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from apportion.config.reward_specs import RewardSpec
from apportion.credit.process import DENSE
from apportion.distributed import collectives
from apportion.errors import ConfigError, ScoreError
from apportion.evidence import Models
from apportion.evidence.process import check_present
from apportion.evidence.reward import reward_evidence
from apportion.models.reward import adjust
from apportion.rewards.function import close, gather
from apportion.rewards.source import RewardSource, Scores, check_answers, make_batch
from apportion.types import Rollouts

LOGGED = "reward/"  # evidence (B,) of each reward by its name in logs, NaN where it does not apply
LEAST_SD = 1e-6  # rewards that differ by less are all alike


class Rewards:
    """Several rewards, or one that is no reward model: Σ_k w_k·r_k over those that apply (`evidence.models.Scorer`).

    Attributes:
        specs: the rewards, in order. sources: all of them by name but the run's first reward model, whose scores come
            with its evidence.
    """

    def __init__(self, specs: Sequence[RewardSpec], sources: Mapping[str, RewardSource]) -> None:
        self.specs, self.sources = list(specs), dict(sources)
        self._first = next((spec for spec in specs if spec.name not in self.sources), None)

    @property
    def wanted(self) -> frozenset[str] | None:
        """The columns that a source takes; None where one takes all."""
        accepted = [source.columns.accepted for source in self.sources.values()]
        known = [names for names in accepted if names is not None]
        return None if len(known) < len(accepted) else frozenset[str]().union(*known)

    @property
    def model_weight(self) -> float:
        """The weight of the first reward model."""
        return 1.0 if self._first is None else self._first.weight

    @property
    def may_be_dense(self) -> bool:
        """Whether a source may answer with a number a token."""
        return any(source.may_be_dense for source in self.sources.values())

    def check_columns(self, columns: Sequence[Mapping[str, Any]]) -> None:
        """Raise DataError for rows without a column that a source requires, or with one that it cannot use."""
        present = frozenset[str]().union(*columns)
        for source in self.sources.values():
            check_present(source.name, source.columns.required - present)
            source.check(columns)

    def score(self, models: Models, rollouts: Rollouts, model_scores: Tensor | None) -> Rollouts:
        """Return the rollouts with their scores; see `Scorer`. Rewards a token are evidence "dense_rewards" (B,T).

        Raises:
            UserCodeError, DataError, ScoreError: a source failed, or no reward applies to a rollout; it is named.
        """
        answers = self._answers(models, rollouts, model_scores)
        evidence = {LOGGED + name: one.values for name, one in answers.items()}
        if self.may_be_dense:
            evidence[DENSE] = self._dense(answers, rollouts)
        raw = self._sum({name: one.values for name, one in answers.items()})
        rollouts = rollouts.with_evidence(**evidence, raw_scores=raw)
        return self.combined(rollouts, models, {})

    def combined(self, rollouts: Rollouts, models: Models, moments: Mapping[str, tuple[float, float]]) -> Rollouts:
        """Return scored rollouts with their scores summed again from each reward's own.

        Args:
            moments: (mean, sd) over the whole batch of rewards that are standardised by them; those without stay as
                they are.
        """
        unclipped = models.scores.model_copy(update={"clip": None})
        dense = rollouts.evidence.get(DENSE)
        parts: dict[str, Tensor] = {}
        for spec in self.specs:
            values = rollouts.evidence[LOGGED + spec.name]
            if spec is self._first:
                values = adjust(values, models.reward, unclipped)
            if spec.normalise == "group":
                values = within_groups(values, rollouts.group)
            elif spec.name in moments:
                values = standardised(values, *moments[spec.name])
            parts[spec.name] = values
        total = self._sum(parts)
        # tokens have been paid what they have by themselves: the score is the rest
        total = total if dense is None else total - dense.sum(dim=1)
        return replace(rollouts, scores=adjust(total, None, clip_of(models)))

    def standardise(self, models: Models, rollouts: Rollouts) -> Rollouts:
        """Return the rollouts with the rewards of `normalise: batch` standardised over all processes; see `Scorer`."""
        names = [spec.name for spec in self.specs if spec.normalise == "batch"]
        if not names or any(LOGGED + name not in rollouts.evidence for name in names):
            return rollouts
        sums = {name: moment_sums(rollouts.evidence[LOGGED + name]) for name in names}
        flat = {f"{name} {key}": value for name, parts in sums.items() for key, value in parts.items()}
        total = collectives.all_reduce_sum(flat)
        moments = {name: moments_of({key: total[f"{name} {key}"] for key in sums[name]}) for name in names}
        return self.combined(rollouts, models, moments)

    def totals(self, models: Models, rollouts: Rollouts, *, dense: bool = True) -> Tensor:
        """Return the weighted sum (B,) of the rewards of other texts, clipped as scores are and not normalised.

        Raises:
            ConfigError: a reward a token, without `dense`: what a text's tokens were paid is in its sum as well.
        """
        raw = None
        if self._first is not None:
            raw = reward_evidence(models.reward_model, rollouts, frozenset({"scores"}))["scores"]
        answers = self._answers(models, rollouts, raw)
        for spec in () if dense else self.specs:
            if answers[spec.name].dense is not None:
                got, fix = "a number a token, with vine", "Return one number a completion, or choose gae."
                expected = "a number a completion: vine's values are rewards of whole texts"
                raise ConfigError(f"rewards.{spec.source}", got, expected, fix)
        values = {name: one.values for name, one in answers.items()}
        if self._first is not None:
            unclipped = models.scores.model_copy(update={"clip": None})
            values[self._first.name] = adjust(values[self._first.name], models.reward, unclipped)
        return adjust(self._sum(values), None, clip_of(models))

    def each(self, models: Models, rollouts: Rollouts) -> dict[str, Tensor]:
        """Return each reward's own answers (B,) by its name in logs, neither weighted nor normalised.

        A number a token is summed; NaN where a reward does not apply. Every reward has a source here.

        Raises:
            UserCodeError, DataError, ScoreError: a source failed; the rollout is named.
        """
        return {name: one.values for name, one in self._answers(models, rollouts, None).items()}

    def _answers(self, models: Models, rollouts: Rollouts, model_scores: Tensor | None) -> dict[str, Scores]:
        """Return the checked answers of every reward by its name in logs; coroutines run at the same time."""
        batch, code = make_batch(models, rollouts), models.user_code
        results: dict[str, Any] = {}
        try:
            for name, source in self.sources.items():
                given = code.call(f"reward {source.name}", source, batch) if source.user_supplied else source(batch)
                results[name] = given
        except BaseException:
            close([one for one in results.values() if inspect.isawaitable(one)])
            raise
        waiting = [name for name, one in results.items() if inspect.isawaitable(one)]
        if waiting:
            named = "reward " + " and ".join(self.sources[name].name for name in waiting)
            results |= dict(zip(waiting, code.call(named, gather, [results[name] for name in waiting]), strict=True))
        if self._first is not None:
            results[self._first.name] = model_scores
        labels = {name: source.name for name, source in self.sources.items()}
        names = [spec.name for spec in self.specs]
        return {name: check_answers(labels.get(name, name), results[name], rollouts.mask) for name in names}

    def _dense(self, answers: Mapping[str, Scores], rollouts: Rollouts) -> Tensor:
        """Return Σ_k w_k·dense_k (B,T). Raises ConfigError for a reward a token that is to be normalised."""
        total = torch.zeros(rollouts.mask.shape, device=rollouts.mask.device)
        for spec in self.specs:
            dense = answers[spec.name].dense
            if dense is not None and spec.normalise is not None:
                fix = "Remove normalise, or return one number a completion."
                raise ConfigError(f"rewards.{spec.source}.normalise", spec.normalise, "a number a completion", fix)
            total = total if dense is None else total + spec.weight * dense
        return total

    def _sum(self, values: Mapping[str, Tensor]) -> Tensor:
        """Return Σ_k w_k·r_k (B,) over the rewards that apply. Raises ScoreError where none applies to a rollout."""
        stacked = torch.stack([values[spec.name] for spec in self.specs])
        applies = ~stacked.isnan()
        none = ~applies.any(dim=0)
        if none.any():
            row = int(none.nonzero()[0])
            fix = "Return a number for every completion from at least one reward, 0 where it is worth nothing."
            names = ", ".join(spec.name for spec in self.specs)
            raise ScoreError(f"reward ({names})", None, "a number from at least one of them", fix, row=row)
        weights = torch.tensor([spec.weight for spec in self.specs], device=stacked.device)
        return (torch.where(applies, stacked, 0.0) * weights[:, None]).sum(dim=0)


def clip_of(models: Models) -> Any:
    """Return the score settings with the clip only: what applies to the sum."""
    return models.scores.model_copy(update={"center": False, "scale": False})


def standardised(values: Tensor, mean: float, sd: float) -> Tensor:
    """Return (values − mean)/sd (B,), 0 where all are alike; NaN stays."""
    return (values - mean) / sd if sd > LEAST_SD else values - values


def within_groups(values: Tensor, group: Tensor) -> Tensor:
    """Return `values` (B,) standardised over the rollouts of each prompt that have one; NaN stays."""
    out = values.clone()
    for one in group.unique():
        rows = group == one
        known = values[rows][~values[rows].isnan()]
        if len(known):
            out[rows] = standardised(values[rows], float(known.mean()), float(known.std(unbiased=False)))
    return out


def moment_sums(values: Tensor) -> dict[str, Tensor]:
    """Return {count, sum, squares} of the values (B,) that are numbers, to be added over processes."""
    known = values[~values.isnan()].double()
    return {"count": torch.tensor(len(known)).to(known), "sum": known.sum(), "squares": known.square().sum()}


def moments_of(sums: Mapping[str, Tensor]) -> tuple[float, float]:
    """Return (mean, standard deviation) from `moment_sums`."""
    count = max(float(sums["count"]), 1.0)
    mean = float(sums["sum"]) / count
    return mean, max(float(sums["squares"]) / count - mean**2, 0.0) ** 0.5
