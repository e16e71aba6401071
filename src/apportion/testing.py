"""The contract of a credit method: one table of clauses, and small batches in order of size to check them on.

`apportion doctor --credit package.module:function` checks a user-supplied method; the first failure is the smallest.
apportion's own tests check the built-in methods against the same clauses on generated batches. Torch only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from apportion.registry import EvidenceKey
from apportion.types import Credit, Rollouts

TOLERANCE = 1e-5
# evidence of built-in producers with one number a rollout
PER_ROW = frozenset(
    {"bootstrap_values", "prompt_score", "shapley_empty", "shapley_error", "shapley_calls", "shapley_joined"}
)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SCALES = (1e-6, 1.0, 1e6, 1e30)


class Case(NamedTuple):
    """One batch: rollouts, and the rewards (B,T) that the credit receives. Off the mask they may hold anything."""

    rollouts: Rollouts
    rewards: Tensor


class Violation(NamedTuple):
    """A violated clause, a message, and the smallest of the tried batches that violates it."""

    clause: str
    message: str
    case: Case


Check = Callable[[Credit, Case], str | None]  # a message where the clause is violated
Make = Callable[[Tensor, torch.Generator], Tensor]  # (mask (B,T), generator) -> evidence


def violations(credit: Credit, extra: Mapping[str, Make] | None = None) -> list[Violation]:
    """Return the violated clauses of `credit`, each with its smallest batch; none when it satisfies the contract.

    Args:
        extra: makes evidence that is not a (B,T) of non-negative numbers, by name.

    An exception that the credit raises on a valid batch violates the clause that is being checked.
    """
    first: dict[str, Violation] = {}
    for case in cases(credit.needs, extra or {}):
        for name in CLAUSES:
            message = None if name in first else violation(name, credit, case)
            if message is not None:
                first[name] = Violation(name, message, case)
    return [first[name] for name in CLAUSES if name in first]


def violation(clause: str, credit: Credit, case: Case) -> str | None:
    """Return a message where `credit` violates `clause` on `case`, else None; the case is not changed."""
    try:
        return CLAUSES[clause](credit, _copied(case))
    except Exception as error:  # a user-supplied function may raise anything, and that is reported
        return f"it raised {type(error).__name__}: {error}"


def _copied(case: Case) -> Case:
    """Return a copy, so that a credit that changes its inputs affects no other check."""
    evidence = {name: value.clone() for name, value in case.rollouts.evidence.items()}
    own = {name: getattr(case.rollouts, name).clone() for name in ("mask", "valid", "logprobs", "response_ids")}
    scores = None if case.rollouts.scores is None else case.rollouts.scores.clone()
    return Case(replace(case.rollouts, scores=scores, evidence=evidence, **own), case.rewards.clone())


def cases(needs: frozenset[str], extra: Mapping[str, Make]) -> Iterator[Case]:
    """Yield small batches in order of size: full rows, holes, empty rows, T = 1, scores of both signs and of size 0."""
    for size in range(1, 13):
        for rows in (r for r in (1, 2, 3) if size % r == 0):
            for seed in range(8):
                yield _case(rows, size // rows, seed, needs, extra)


def _case(rows: int, length: int, seed: int, needs: frozenset[str], extra: Mapping[str, Make]) -> Case:
    generator = torch.Generator().manual_seed(1000 * rows + 100 * length + seed)
    mask = torch.rand(rows, length, generator=generator) < (1.0 if seed < 3 else 0.6)
    if seed == 4:
        mask[0] = False
    evidence = {name: _evidence(name, mask, generator, extra) for name in sorted(needs)}
    scores = 3 * torch.randn(rows, generator=generator) * (seed != 1)
    rollouts = Rollouts(
        prompt_ids=torch.randint(5, 90, (rows, 2), generator=generator),
        prompt_mask=torch.ones(rows, 2, dtype=torch.bool),
        response_ids=torch.randint(5, 90, (rows, length), generator=generator),
        mask=mask,
        logprobs=-torch.rand(rows, length, generator=generator),
        scores=scores,
        group=torch.arange(rows),
        evidence=evidence,
    )
    rewards = torch.where(mask, torch.randn(rows, length, generator=generator), 0.0)
    return Case(rollouts, rewards)


def _evidence(need: str, mask: Tensor, generator: torch.Generator, extra: Mapping[str, Make]) -> Tensor:
    if need in extra:
        return extra[need](mask, generator)
    per_row = EvidenceKey.of(need).name in PER_ROW
    noise = torch.rand(len(mask) if per_row else mask.shape, generator=generator)
    return -noise if "logprobs" in need else noise


def _assign(credit: Credit, case: Case) -> Tensor:
    return credit.assign(case.rollouts, case.rewards, credit.init())[0]


def _masked(case: Case) -> Tensor:
    """Return the rewards (B,T), 0 off the mask."""
    return torch.where(case.rollouts.mask, case.rewards, 0.0)


def _shape(credit: Credit, case: Case) -> str | None:
    out = _assign(credit, case)
    if not isinstance(out, Tensor) or out.shape != case.rewards.shape:
        got = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
        return f"it returned {got} for rewards {tuple(case.rewards.shape)}"
    return None


def _dtype(credit: Credit, case: Case) -> str | None:
    for dtype in DTYPES:
        evidence = {k: v.to(dtype) if v.is_floating_point() else v for k, v in case.rollouts.evidence.items()}
        rollouts = replace(case.rollouts, logprobs=case.rollouts.logprobs.to(dtype), evidence=evidence)
        out = credit.assign(rollouts, case.rewards.to(dtype), credit.init())[0]
        if out.dtype != dtype:
            return f"it returned {out.dtype} for rewards {dtype}"
    return None


def _zeros(credit: Credit, case: Case) -> str | None:
    off = _assign(credit, case)[~case.rollouts.mask]
    return f"it returned {off[off != 0].tolist()} off the mask" if (off != 0).any() else None


def _finite(credit: Credit, case: Case) -> str | None:
    """Values off the mask, NaN included, must not reach the rewards; large scores must not overflow."""
    mask = case.rollouts.mask
    evidence = {k: _poisoned(v, mask) for k, v in case.rollouts.evidence.items()}
    rollouts = replace(case.rollouts, logprobs=_poisoned(case.rollouts.logprobs, mask), evidence=evidence)
    for factor in (1.0, 1e30):
        out = credit.assign(rollouts, _poisoned(case.rewards * factor, mask), credit.init())[0]
        if not torch.isfinite(out).all():
            wrong = out[~torch.isfinite(out)].tolist()
            return f"it returned {wrong}, with NaN off the mask and rewards times {factor:g}"
    return None


def _poisoned(values: Tensor, mask: Tensor) -> Tensor:
    if values.shape != mask.shape or not values.is_floating_point():
        return values
    return torch.where(mask, values, torch.nan)


def _unchanged(credit: Credit, case: Case) -> str | None:
    before = _copied(case)
    _assign(credit, case)
    pairs = {
        "the rewards": (before.rewards, case.rewards),
        "the log-probabilities": (before.rollouts.logprobs, case.rollouts.logprobs),
        "the mask": (before.rollouts.mask, case.rollouts.mask),
        **{f"evidence {k!r}": (v, case.rollouts.evidence[k]) for k, v in before.rollouts.evidence.items()},
    }
    changed = [name for name, (a, b) in pairs.items() if not torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))]
    return f"it changed {', '.join(changed)} in place" if changed else None


def _state(credit: Credit, case: Case) -> str | None:
    state = credit.init()
    before = {k: v.clone() for k, v in state.items()}
    after = credit.assign(case.rollouts, case.rewards, state)[1]
    for found in (state, after):
        if found.keys() != before.keys() or any(not torch.equal(found[k], before[k]) for k in before):
            return "assign changed its state: controllers belong in `update`, which runs once a batch"
    return None


def _padding(credit: Credit, case: Case) -> str | None:
    rollouts, width = case.rollouts, case.rewards.shape[1]
    token_fields = ("response_ids", "mask", "valid", "logprobs", "old_logprobs")
    wide = replace(
        rollouts,
        prompt_ids=torch.nn.functional.pad(rollouts.prompt_ids, (1, 0)),
        prompt_mask=torch.nn.functional.pad(rollouts.prompt_mask, (1, 0)),
        evidence={k: _widened(v, width) for k, v in rollouts.evidence.items()},
        **{name: _widened(getattr(rollouts, name), width) for name in token_fields},
    )
    out = credit.assign(wide, _widened(case.rewards, width), credit.init())[0]
    if (out[:, width:] != 0).any():
        return "its rewards are not 0 on padding"
    return _difference(
        out[:, :width], _assign(credit, case), "with a column of padding on the left and two on the right"
    )


def _widened(values: Tensor, width: int) -> Tensor:
    if values.dim() != 2 or values.shape[1] != width:
        return values
    return torch.nn.functional.pad(values, (0, 2), value=torch.nan if values.is_floating_point() else 0)


def _row(case: Case, row: int) -> Case:
    index = torch.tensor([row])
    return Case(case.rollouts.select(index), case.rewards[index])


def _rows(credit: Credit, case: Case) -> str | None:
    single = torch.cat([_assign(credit, _row(case, row)) for row in range(len(case.rollouts))])
    return _difference(single, _assign(credit, case), "one row at a time")


def _order(credit: Credit, case: Case) -> str | None:
    back = torch.arange(len(case.rollouts)).flip(0)
    out = credit.assign(case.rollouts.select(back), case.rewards[back], credit.init())[0]
    return _difference(out, _assign(credit, case)[back], "with the rows in reverse")


def _difference(one: Tensor, two: Tensor, when: str) -> str | None:
    gap = (one.double() - two.double()).abs()
    if not (gap > TOLERANCE + TOLERANCE * two.double().abs()).any():
        return None
    return f"its rewards differ by {float(gap.max()):.3g} {when}"


def _sum_kept(credit: Credit, case: Case) -> str | None:
    if not credit.keeps_return:
        return None
    for scale in SCALES:
        rewards = _masked(case) * scale
        before = rewards.double().sum(dim=1)
        after = credit.assign(case.rollouts, rewards, credit.init())[0].double().sum(dim=1)
        drift = (after - before).abs()
        if (drift > TOLERANCE * rewards.double().abs().sum(dim=1).clamp_min(1.0)).any():
            row = int(drift.argmax())
            return f"row {row} summed to {float(before[row]):.4g} before and {float(after[row]):.4g} after"
    return None


def _causal(credit: Credit, case: Case) -> str | None:
    if not credit.causal:
        return None
    out = _assign(credit, case)
    for cut in range(case.rewards.shape[1] - 1):
        changed = _assign(credit, later_changed(case, cut))
        gap = (changed[:, : cut + 1] - out[:, : cut + 1]).abs().max()
        if gap > TOLERANCE:
            moved = f"rewards up to token {cut} moved by {float(gap):.3g} when later tokens changed"
            return f"declared causal, but {moved}"
    return None


def later_changed(case: Case, cut: int, seed: int = 0) -> Case:
    """Return a copy in which everything after token `cut` differs: mask, tokens, evidence, rewards and scores.

    Whether any token follows is kept, and with it the score of a response that has ended: both are known at `cut`.
    """
    rollouts, generator = case.rollouts, torch.Generator().manual_seed(seed)
    later = (torch.arange(rollouts.mask.shape[1]) > cut).expand_as(rollouts.mask)
    continues = (rollouts.mask & later).any(dim=1)
    mask = rollouts.mask ^ later if seed == 0 else torch.where(later, _coin(later, generator), rollouts.mask)
    mask = mask & (~later | continues[:, None])
    mask[:, -1] |= continues & ~(mask & later).any(dim=1)

    def changed(values: Tensor) -> Tensor:
        if values.shape != mask.shape:
            return values
        if values.dtype == torch.bool:
            return values ^ later
        return torch.where(
            later, values.nan_to_num(0, 0, 0) + 0.2 + torch.rand(mask.shape, generator=generator), values
        )

    assert rollouts.scores is not None
    fields: dict[str, Any] = {
        "mask": mask,
        "valid": mask,
        "response_ids": torch.where(later, rollouts.response_ids + 1, rollouts.response_ids),
        "logprobs": torch.where(later, -changed(-rollouts.logprobs), rollouts.logprobs),
        "scores": torch.where(continues, rollouts.scores + 0.9, rollouts.scores),
        "evidence": {k: changed(v) for k, v in rollouts.evidence.items()},
    }
    return Case(replace(rollouts, **fields), torch.where(mask, changed(case.rewards), 0.0))


def _coin(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.rand(like.shape, generator=generator) < 0.5


def _share(credit: Credit, case: Case) -> str | None:
    if credit.share is None:
        return None
    share, mask = credit.share(case.rollouts), case.rollouts.mask
    if share.shape != mask.shape or (share[~mask] != 0).any():
        return f"its share is {tuple(share.shape)} for a mask {tuple(mask.shape)}, or not 0 off the mask"
    sums = share.sum(dim=1)
    if not ((sums - mask.any(dim=1).float()).abs() <= TOLERANCE).all():
        return f"its shares sum to {sums.tolist()}, not to 1 in every row with tokens"
    return "a share is negative" if (share < 0).any() else None


def _stats(credit: Credit, case: Case) -> str | None:
    if credit.stats is None:
        return None
    rows = [_row(case, row) for row in range(len(case.rollouts))]
    single = [credit.stats(row.rollouts, row.rewards, row.rewards) for row in rows]
    for name, (total, count) in credit.stats(case.rollouts, case.rewards, case.rewards).items():
        if not torch.isfinite(total) or not torch.isfinite(count):
            return f"statistic {name!r} is ({float(total)}, {float(count)})"
        added = sum(float(one[name][0]) for one in single)
        if abs(added - float(total)) > 1e-4 * max(1.0, abs(added)):
            return f"statistic {name!r} is {float(total):.4g}, but adds up to {added:.4g} over the rows"
    return None


CLAUSES: Mapping[str, Check] = {
    "shape kept": _shape,
    "dtype kept": _dtype,
    "zeros off the mask": _zeros,
    "finite": _finite,
    "inputs not changed": _unchanged,
    "state moved by `update` only": _state,
    "padding does not matter": _padding,
    "rows do not depend on one another": _rows,
    "order of rows does not matter": _order,
    "keeps_return as declared": _sum_kept,
    "causal as declared": _causal,
    "shares sum to 1": _share,
    "statistics are finite and add up": _stats,
}
