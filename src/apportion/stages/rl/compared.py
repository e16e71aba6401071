"""Credits that are only logged beside the run's own: one that fails is left out, with one warning, and counted."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from torch import Tensor

from apportion.errors import ApportionError, DataError, ModelError, ScoreError
from apportion.evidence import Models
from apportion.evidence.scoring import LEFT_OUT, Failures
from apportion.masking import place_on_last
from apportion.stages.attention import is_attention, lacking
from apportion.stages.method import not_logged
from apportion.types import Credit, Rollouts

Warn = Callable[[str], None]
COUNTED = "is left out of the log where it fails (compare/left_out counts)"


def available(models: Models, compare: Mapping[str, Credit], warn: Warn = lambda line: None) -> dict[str, Credit]:
    """Return the compared credits without those whose attention a model cannot give; each of these is one warning."""
    found: dict[str, ModelError | None] = {}
    kept = {}
    for name, one in compare.items():
        needs = sorted(filter(is_attention, one.needs))
        found |= {need: lacking(models, need) for need in needs if need not in found}
        error = next((found[need] for need in needs if found[need] is not None), None)
        if error is None:
            kept[name] = one
        else:
            warn(not_logged(name, error))
    return kept


class Compared(dict[str, Credit]):
    """The compared credits of a run, by name. Credit that is only logged never ends a run.

    Attributes:
        logged: the evidence that they alone need, the same in all processes.
        left_out: how many of them the log of the current batch lacks.
    """

    def __init__(self, credits: Mapping[str, Credit], needed: Iterable[str] = (), warn: Warn = lambda line: None):
        super().__init__(credits)
        self.left_out, self._warn = 0, warn
        self.logged = frozenset[str]().union(*(one.needs for one in self.values())) - frozenset(needed)
        self._failed, self._named, self._lost = set[str](), set[str](), set[str]()

    @property
    def needs(self) -> frozenset[str]:
        """The evidence to produce for them alone: without what a model or a function failed to give, in any row."""
        return self.logged - self._failed

    def fail(self, failures: Failures) -> None:
        """Name each credit whose evidence failed, once; what failed without a row is not tried again."""
        self._failed |= {need for need, error in failures.items() if error.row is None}
        for name, one in self.items():
            error = next((failures[need] for need in sorted(one.needs) if need in failures), None)
            if error is not None:
                self._name(name, error)

    def rewards(self, rollouts: Rollouts) -> dict[str, Tensor]:
        """Return the rewards (B,T) that each would have given, without those that fail."""
        assert rollouts.scores is not None
        # not `credit.apply`, which refuses some credits where a critic's value stands for what a cut left out: these
        # are only logged
        placed, given = place_on_last(rollouts.scores.float(), rollouts.mask), dict[str, Tensor]()
        for name in [name for name in self if name not in self._lost]:
            try:
                given[name] = self._rewards(self[name], rollouts, placed)
            except LEFT_OUT as error:
                if not isinstance(error, DataError | ScoreError):  # of this batch
                    self._lost.add(name)
                self._name(name, error)
        self.left_out = len(self) - len(given)
        return given

    def _rewards(self, one: Credit, rollouts: Rollouts, placed: Tensor) -> Tensor:
        absent = sorted(one.needs & self.logged - rollouts.evidence.keys())
        if absent:
            fix = "It failed in this process or in another one."
            raise DataError("evidence", "no " + ", ".join(absent), "that of every rollout", fix)
        rewards, _ = one.assign(rollouts, placed, one.init())
        return rewards

    def _name(self, name: str, error: ApportionError) -> None:
        if name not in self._named:
            self._named.add(name)
            self._warn(not_logged(name, error, COUNTED))
