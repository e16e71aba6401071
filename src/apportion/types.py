"""The batch that every stage passes on, and the signatures of the four kinds of method.

Shapes: B rollouts, P prompt tokens, T response tokens. Index t is response token t; "last" is the last True of the
mask, never its sum minus one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from apportion.errors import DataError
from apportion.masking import check_finite

State = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True, eq=False)
class Rollouts:
    """A batch of prompts with sampled responses.

    Attributes:
        prompt_ids: (B,P) int64, left-padded.
        prompt_mask: (B,P) bool, True on prompt tokens.
        response_ids: (B,T) int64, right-padded.
        mask: (B,T) bool, True on tokens that the policy sampled, EOS included; may have holes (tool output).
        logprobs: (B,T) float, nats, under the policy that sampled.
        scores: (B,) float, the reward model's score; None until scored.
        group: (B,) int64, rollouts of one prompt share a value.
        evidence: tensors of shape (B,), (B,T) or (B,T,k) that methods request by name in their `needs`.
        valid: (B,T) bool, tokens that the models attend to; defaults to `mask`. A token after a hole in it is
            predicted from the last token before the hole.
        ended: (B,) bool, False where the response was cut off; None means that all ended.
        turn: (B,T) int64 turn ids, or None.
        policy_version: (B,) int64, or None.
        old_logprobs: (B,T) float, the trainer's own log-probabilities, used in ratios; defaults to `logprobs`.

    Raises:
        DataError: a tensor whose shape does not fit the others, by name.
    """

    prompt_ids: Tensor
    prompt_mask: Tensor
    response_ids: Tensor
    mask: Tensor
    logprobs: Tensor
    scores: Tensor | None = None
    group: Tensor
    evidence: Mapping[str, Tensor] = field(default_factory=dict)
    valid: Tensor = None  # type: ignore[assignment]
    ended: Tensor | None = None
    turn: Tensor | None = None
    policy_version: Tensor | None = None
    old_logprobs: Tensor = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        if self.valid is None:
            object.__setattr__(self, "valid", self.mask)
        if self.old_logprobs is None:
            object.__setattr__(self, "old_logprobs", self.logprobs)
        self._check_shapes()

    def _check_shapes(self) -> None:
        if self.mask.dim() != 2 or self.mask.dtype != torch.bool:
            got: Any = f"{self.mask.dtype} {tuple(self.mask.shape)}"
            raise DataError("Rollouts.mask", got, "a bool tensor (B,T)", "Pass `mask.bool()`, (B,T).")
        if self.prompt_ids.dim() != 2:
            got = tuple(self.prompt_ids.shape)
            raise DataError("Rollouts.prompt_ids", got, "shape (B,P)", "Left-pad the prompts into a batch.")
        rows, length = self.mask.shape
        expected: dict[str, tuple[int, ...]] = {
            "prompt_ids": (rows, *self.prompt_ids.shape[1:2]),
            "prompt_mask": tuple(self.prompt_ids.shape),
            **dict.fromkeys(("response_ids", "logprobs", "valid", "old_logprobs", "turn"), (rows, length)),
            **dict.fromkeys(("scores", "group", "ended", "policy_version"), (rows,)),
        }
        for name, shape in expected.items():
            value = getattr(self, name)
            if value is not None and tuple(value.shape) != shape:
                raise DataError(f"Rollouts.{name}", tuple(value.shape), f"shape {shape}", "Shapes follow mask (B,T).")
        for key, tensor in self.evidence.items():
            got = tuple(tensor.shape)
            if got != (rows,) and (got[:2] != (rows, length) or len(got) > 3):
                fix = "Check the producer of this evidence."
                raise DataError(f"evidence[{key!r}]", got, f"({rows},) or ({rows},{length}[,k])", fix)

    def __len__(self) -> int:
        """Return B, the number of rollouts."""
        return self.mask.shape[0]

    @property
    def bootstrapped(self) -> Tensor:
        """(B,) bool: rows that were cut off and whose evidence "bootstrap_values" stands for what would have followed.

        A credit pays such a row for its own tokens only: the score, and whatever else comes with a response's end, is
        in the value after the cut.
        """
        if self.ended is None or "bootstrap_values" not in self.evidence:
            return torch.zeros(len(self), dtype=torch.bool, device=self.mask.device)
        return ~self.ended.bool()

    def select(self, rows: Tensor) -> Rollouts:
        """Return the rollouts at `rows` (int64 or bool index over B), evidence included."""
        values = {}
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, Tensor):
                value = value[rows]
            elif f.name == "evidence":
                value = {k: v[rows] for k, v in value.items()}
            values[f.name] = value
        return Rollouts(**values)

    def with_evidence(self, **evidence: Tensor) -> Rollouts:
        """Return a copy with `evidence` added."""
        return replace(self, evidence={**self.evidence, **evidence})

    def require(self, name: str, fix: str = "Produce it in scoring, or pass it with `with_evidence`.") -> Tensor:
        """Return evidence `name` as it is. Raises DataError where it is absent, with the names of what is there."""
        if name not in self.evidence:
            got = sorted(self.evidence) or "no evidence"
            raise DataError(f"evidence[{name!r}]", got, f"a tensor named {name!r}", fix)
        return self.evidence[name]

    def token_evidence(self, name: str, *, least: float | None = None, fix: str = "Check its producer.") -> Tensor:
        """Return evidence `name` (B,T) in float32, 0 off the mask.

        Raises:
            DataError: it is absent, not (B,T), or on the mask not finite or below `least`; it names rollout and token.
        """
        values = self._require_shape(name, tuple(self.mask.shape))
        # `where`, not a product: off the mask there may be anything, NaN included
        return check_finite(f"evidence[{name!r}]", torch.where(self.mask, values, 0.0), fix, least=least)

    def row_evidence(self, name: str, *, fix: str = "Check its producer.") -> Tensor:
        """Return evidence `name` (B,) in float32, 0 on rows without tokens. Raises DataError as `token_evidence`."""
        values = self._require_shape(name, (len(self),))
        return check_finite(f"evidence[{name!r}]", torch.where(self.mask.any(dim=1), values, 0.0), fix)

    def _require_shape(self, name: str, shape: tuple[int, ...]) -> Tensor:
        values = self.require(name)
        if tuple(values.shape) != shape:
            raise DataError(f"evidence[{name!r}]", tuple(values.shape), f"shape {shape}", "Check its producer.")
        return values.float()


class Credit(NamedTuple):
    """A credit method: where the reward lands.

    `assign(rollouts, rewards (B,T), state)` returns rewards (B,T) and the state; rows are independent of one another
    and controllers are never moved there. `stats(rollouts, before, after)` returns {name: (sum, count)}, which may be
    added over processes; `update(state, stats)` moves controllers once a batch.
    """

    init: Callable[[], State]
    assign: Callable[[Rollouts, Tensor, State], tuple[Tensor, State]]
    needs: frozenset[str]
    keeps_return: bool
    causal: bool
    share: Callable[[Rollouts], Tensor] | None = None  # a redistributor's; None where a token's part may be negative
    stats: Callable[[Rollouts, Tensor, Tensor], dict[str, tuple[Tensor, Tensor]]] | None = None
    update: Callable[[State, dict[str, tuple[Tensor, Tensor]]], State] | None = None
    redistributes: bool = False  # spreads the row's sum in signed parts, so that it has no `share`


class Advantages(NamedTuple):
    """The result of an estimator: raw (not whitened) advantages and returns, both (B,T), 0 off the mask."""

    advantages: Tensor
    returns: Tensor


class Segmenter(Protocol):
    """Decides what counts as one action: rollouts -> (B,T) int64, ids from 0 along each row, -1 off the mask."""

    needs: frozenset[str]

    def __call__(self, rollouts: Rollouts) -> Tensor: ...


class Estimator(Protocol):
    """Turns rewards into advantages: (rewards (B,T), segments (B,T), rollouts) -> Advantages."""

    needs: frozenset[str]

    def __call__(self, rewards: Tensor, segments: Tensor, rollouts: Rollouts) -> Advantages: ...


class PolicyLoss(NamedTuple):
    """A policy loss: a sum over the batch, and the denominator that the caller divides it by.

    `terms(logprobs (B,T), rollouts, advantages (B,T), mask (B,T), segments (B,T))` returns (the sum of the loss, sums
    of statistics by name, each over tokens). `denominator(mask, segments)` returns the declared count of these rows, a
    scalar tensor that may be added over micro-batches and processes: tokens, actions, sequences, or a constant a
    sequence. It is taken once over the whole optimisation batch.

    `ratio` names what one importance ratio covers ("token", "action" or "sequence"); `needs` are names of evidence.
    """

    terms: Callable[[Tensor, Rollouts, Tensor, Tensor, Tensor], tuple[Tensor, dict[str, Tensor]]]
    denominator: Callable[[Tensor, Tensor], Tensor]
    ratio: str
    needs: frozenset[str] = frozenset()


class Method(NamedTuple):
    """The four built methods of a run, with their resolved specs (for the run folder)."""

    credit: Credit
    segment: Segmenter
    estimate: Estimator
    loss: PolicyLoss
    specs: dict[str, Any]

    @property
    def needs(self) -> frozenset[str]:
        """Return the names of all evidence to produce; "credit_share" comes from the credit itself."""
        needed = self.credit.needs | self.segment.needs | self.estimate.needs | self.loss.needs
        return needed - {"credit_share"}

    @property
    def critic(self) -> bool:
        """Whether values are learned."""
        return "values" in self.estimate.needs

    @property
    def group_wise(self) -> bool:
        """Whether several rollouts of one prompt are compared."""
        return bool(getattr(self.estimate, "group_wise", False))
